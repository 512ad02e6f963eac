"""The data job's process: ``python -m preference_tuning.data FOLDER``."""

import os
from pathlib import Path

from preference_tuning import jobs
from preference_tuning.data import prepare
from preference_tuning.data.job import DATASET, DataJob, Tokens
from preference_tuning.data.lengths import TokenRules
from preference_tuning.data.table import Manifest
from preference_tuning.models import chat


def main(folder: Path, job: DataJob) -> Manifest:
    """Prepare the dataset in ``folder`` and return its manifest."""
    rules = _token_rules(job, job.tokens) if job.tokens else None
    return prepare.prepare(job.config, job.fingerprints, folder / DATASET, rules).manifest


def _token_rules(job: DataJob, tokens: Tokens) -> TokenRules:
    from preference_tuning.models.tokenizer import load_tokenizer

    # This process forks nothing, so the tokenizer may use every core.
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    tokenizer = load_tokenizer(tokens.base_model, tokens.source, job.output_dir)
    data = job.config
    keep_end = data.problems.long_prompt == "keep_end"
    room = chat.Room(tokens.max_length, data.max_prompt_length, keep_end)
    return TokenRules(tokenizer, room, tokens.sft_length)


if __name__ == "__main__":
    jobs.main(DataJob, main)
