"""The formats of preference and SFT data: recognised by the columns, converted row by row.

sample.py           the first rows, and the columns the config names
signatures.py       which formats the columns fit
prompt_columns.py   which columns make the prompt
build.py            what converts the rows of a format
rows.py             one class for each way in which rows hold answers
split.py            two answers, or two conversations that share a prompt
prompts.py, messages.py, texts.py, tools.py, labels.py, extras.py, values.py    the parts of a row
"""

from preference_tuning.data.formats.recognise import Recognised, matters, recognise
from preference_tuning.data.formats.sft import RecognisedSFT, recognise_sft

__all__ = ["Recognised", "RecognisedSFT", "matters", "recognise", "recognise_sft"]
