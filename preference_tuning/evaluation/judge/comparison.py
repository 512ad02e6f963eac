"""Two models' answers to the same prompts, compared by the judge in both orders."""

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple, TypeVar

from pydantic import BaseModel

from preference_tuning import fingerprint
from preference_tuning.config import JudgeConfig
from preference_tuning.errors import PreferenceTuningError
from preference_tuning.evaluation.judge import prompt
from preference_tuning.evaluation.judge.client import Client
from preference_tuning.evaluation.judge.prompt import Choice, Question
from preference_tuning.evaluation.judge.replies import NOTHING, Cost, Kept, Replies
from preference_tuning.progress import bar

Item = TypeVar("Item")

WINS = {"A": 1.0, "tie": 0.5, "B": 0.0}


class Comparison(NamedTuple):
    """A prompt with the answers of two models; the first is the one whose wins are counted."""

    prompt: str
    """The conversation as text, such as ``prompt.conversation`` makes of messages."""
    candidate: str
    parent: str
    candidate_length: int
    """Lengths in any one unit, tokens for instance."""
    parent_length: int
    group: str
    """Equal for comparisons that are not independent: those of one prompt."""


class Opinion(BaseModel):
    """What the judge said of a comparison."""

    group: str
    length_difference: int
    """Candidate less parent."""
    asked: bool
    """False if both answers are the same text, which is a tie that nobody has to be asked about."""
    candidate_first: Choice | None
    """A is the candidate. None: no valid reply."""
    candidate_second: Choice | None
    """B is the candidate."""

    @property
    def win(self) -> float | None:
        """1 for a win of the candidate, 0 for a loss, over both orders; None if a reply is missing."""
        if self.candidate_first is None or self.candidate_second is None:
            return None
        return (WINS[self.candidate_first] + 1 - WINS[self.candidate_second]) / 2

    @property
    def valid(self) -> list[Choice]:
        """The valid replies."""
        return [choice for choice in (self.candidate_first, self.candidate_second) if choice]


class Judged(BaseModel):
    """The opinions on all comparisons, and their cost."""

    opinions: list[Opinion]
    cost: Cost


def compare(
    items: Sequence[Comparison],
    config: JudgeConfig,
    folder: Path,
    key: str | None = None,
    seed: int = 42,
    spent: Cost = NOTHING,
) -> Judged:
    """Ask the judge about ``config.prompts`` of the comparisons in both orders, and return what it said.

    What it said before is read from ``folder`` and not asked again. A reply that is not what was asked for is asked
    again, and counts as missing after ``ATTEMPTS``: it is never taken for a win.

    Args:
        items: what may be compared, one a prompt.
        config: which judge, at which pace, within which budget.
        folder: where replies are kept; all evaluations may share one.
        key: for the endpoint, such as ``key_of`` of the client finds it.
        seed: of the jitter between retries.
        spent: what counts towards the budget already, such as the calibration.

    Raises:
        PreferenceTuningError: the judge cannot be asked, or the budget is spent; what it said so far is kept.
    """
    return ask(spread(items, config.prompts), config, folder, key, seed, spent, "judging")


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """Return at most ``count`` of the items, evenly spread over them."""
    kept = min(count, len(items))
    return [items[i * len(items) // kept] for i in range(kept)]


def ask(
    items: Sequence[Comparison],
    config: JudgeConfig,
    folder: Path,
    key: str | None,
    seed: int,
    spent: Cost,
    title: str,
) -> Judged:
    """Do what ``compare`` does for every one of the items, under a progress bar with this title."""
    orders = [(_question(item, False), _question(item, True)) for item in items]
    questions = {key_of(q, config): q for pair in orders for q in pair if q.first != q.second}
    replies = Replies(folder)
    _Asking(questions, config, replies, spent).run(key, seed, title)
    said = [[replies.choice(key_of(q, config)) for q in pair] for pair in orders]
    opinions = [_opinion(item, *choices) for item, choices in zip(items, said, strict=True)]
    return Judged(opinions=opinions, cost=replies.cost(questions))


def key_of(question: Question, config: JudgeConfig) -> str:
    """Return the hash of all that decides a reply, except the mark that is new in each request."""
    asked = prompt.messages(question, fence="")
    return fingerprint.of_value([config.url, config.model, config.max_tokens, asked])


def _question(item: Comparison, turned: bool) -> Question:
    first, second = (item.parent, item.candidate) if turned else (item.candidate, item.parent)
    return Question(item.prompt, first, second)


def _opinion(item: Comparison, candidate_first: Choice | None, candidate_second: Choice | None) -> Opinion:
    same = item.candidate == item.parent
    return Opinion(
        group=item.group,
        length_difference=item.candidate_length - item.parent_length,
        asked=not same,
        candidate_first="tie" if same else candidate_first,
        candidate_second="tie" if same else candidate_second,
    )


class _Asking:
    """The questions that are still open, asked by several threads until one of them fails."""

    def __init__(self, questions: Mapping[str, Question], config: JudgeConfig, replies: Replies, spent: Cost) -> None:
        self._questions, self._config, self._replies = questions, config, replies
        self._spent = Cost.sum([spent, replies.cost(questions)])
        self._lock = threading.Lock()

    def run(self, key: str | None, seed: int, title: str) -> None:
        open_ones = [name for name in self._questions if not self._replies.settled(name)]
        if not open_ones:
            return
        total = len(self._questions)
        with (
            Client(self._config, key, seed) as client,
            bar(title, total, done=total - len(open_ones)) as progress,
            ThreadPoolExecutor(self._config.concurrency) as pool,
        ):
            futures = [pool.submit(self._settle, name, client) for name in open_ones]
            try:
                for future in as_completed(futures):
                    future.result()
                    progress.update()
            except BaseException:
                client.pace.stop()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _settle(self, name: str, client: Client) -> None:
        while not self._replies.settled(name):
            self._check_budget()
            reply = client.ask(prompt.messages(self._questions[name], prompt.new_fence()))
            kept = Kept(
                key=name,
                better=prompt.choice(reply.text),
                prompt_tokens=reply.prompt_tokens,
                completion_tokens=reply.completion_tokens,
            )
            self._replies.add(kept)
            with self._lock:
                self._spent = Cost.sum([self._spent, kept.cost])

    def _check_budget(self) -> None:
        most, spent = self._config.max_total_tokens, self._spent.tokens
        if most is None:
            return
        if spent is None:
            raise PreferenceTuningError(
                f"evaluation.judge.max_total_tokens: {self._config.url} does not say what a reply costs, so the bound "
                "cannot be kept; leave it out"
            )
        if spent >= most:
            raise PreferenceTuningError(
                f"evaluation.judge.max_total_tokens: {spent} tokens are spent of {most}, and questions are left. The "
                "replies so far are kept: give more, and the same command continues behind them"
            )
