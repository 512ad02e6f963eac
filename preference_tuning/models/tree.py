"""Sequences as one token tree: what several of them begin with goes through the model once.

A pair's chosen and rejected answers share their prompt (Wang & Hegde 2024, arXiv 2410.20305); the prompts of a batch
share their system turn; answers may share their first words. A hidden state depends on the tokens before it and on
nothing else, so each distinct beginning needs one position. All linear layers then see every distinct token once and
no padding at all; only attention, a small part of the work, looks at whole sequences (``models.attention``).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Block:
    """Sequences whose attention is computed together, padded to the longest.

    Attributes:
        queries: [S, Q] the nodes that ask; of sequences that are whole, all of them.
        keys: [S, K] the nodes along each sequence, from its first token on.
        mask: [S, 1, Q, K] which key a query sees; None: queries are keys, and each sees those before it.
    """

    queries: Tensor
    keys: Tensor
    mask: Tensor | None


@dataclass
class Tree:
    """T nodes, each a token after one distinct beginning, and who attends to whom.

    Attributes:
        blocks: the sequences' attention.
        taken: [T] where the output of each node lies among the blocks' queries, one block after the other.
    """

    blocks: list[Block]
    taken: Tensor

    def to(self, device: torch.device) -> "Tree":
        """Return the tree on ``device``."""
        moved = [
            Block(b.queries.to(device), b.keys.to(device), None if b.mask is None else b.mask.to(device))
            for b in self.blocks
        ]
        return Tree(moved, self.taken.to(device))


def grow(sequences: Sequence[list[int]]) -> tuple[list[int], list[int], list[list[int]], Tree]:
    """Merge sequences into a tree.

    Returns:
        The token of each node, its position, the nodes along each sequence, and the tree.
    """
    children: dict[tuple[int, int], int] = {}
    tokens: list[int] = []
    positions: list[int] = []
    paths: list[list[int]] = []
    new: list[int] = []  # nodes that a sequence adds: always its end
    for sequence in sequences:
        before, node, path = len(tokens), -1, []
        for position, token in enumerate(sequence):
            node = children.setdefault((node, token), len(tokens))
            if node == len(tokens):
                tokens.append(token)
                positions.append(position)
            path.append(node)
        paths.append(path)
        new.append(len(tokens) - before)
    return tokens, positions, paths, _plan(paths, new, len(tokens))


def _plan(paths: list[list[int]], new: list[int], size: int) -> Tree:
    """Plan the attention: mostly new sequences whole and causal, mostly shared ones by their new end alone."""
    adding = [(path, added) for path, added in zip(paths, new, strict=True) if added]
    whole = [member for member in adding if 2 * member[1] >= len(member[0])]
    ends = [member for member in adding if 2 * member[1] < len(member[0])]
    taken = torch.empty(size, dtype=torch.long)
    blocks: list[Block] = []
    start = 0
    for members, is_whole in ((whole, True), (ends, False)):
        if members:
            blocks.append(_block(members, is_whole))
            width = blocks[-1].queries.shape[1]
            for i, (path, added) in enumerate(members):
                last = start + i * width + (len(path) if is_whole else added)
                taken[path[-added] : path[-1] + 1] = torch.arange(last - added, last)
            start += blocks[-1].queries.numel()
    return Tree(blocks, taken)


def _block(members: list[tuple[list[int], int]], whole: bool) -> Block:
    keys = _padded([path for path, _ in members])
    if whole:
        return Block(keys, keys, None)
    queries = _padded([path[-added:] for path, added in members])
    before = torch.tensor([[len(path) - added] for path, added in members])
    position = before + torch.arange(queries.shape[1])  # [S, Q]: of a query along its sequence
    mask = torch.arange(keys.shape[1]) <= position[:, :, None]
    return Block(queries, keys, mask[:, None])


def _padded(rows: list[list[int]]) -> Tensor:
    """Return the rows as a matrix. Padding repeats node 0: what it gives is never taken."""
    width = max(map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows])
