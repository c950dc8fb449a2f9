"""The order in which an epoch's chats are trained, and which of a step's chats are computed at once."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch.utils.data import Sampler


def dealt(lengths: Sequence[int], at_once: int) -> list[int]:
    """Chats in rows of about as many tokens, so that of several processes none waits long for another.

    Args:
        lengths: of a step's chats, in tokens.
        at_once: chats of a row.

    Returns:
        Positions in `lengths`, row by row; the last row is shorter where they do not come out even.
    """
    room = [min(at_once, len(lengths) - start) for start in range(0, len(lengths), at_once)]
    rows: list[list[int]] = [[] for _ in room]
    for chat in sorted(range(len(lengths)), key=lambda chat: -lengths[chat]):
        free = [row for row, has in zip(rows, room, strict=True) if len(row) < has]
        min(free, key=lambda row: sum(lengths[other] for other in row)).append(chat)
    return [chat for row in rows for chat in row]


def alike(lengths: Sequence[int]) -> list[int]:
    """Chats by length: what is padded to a common length wastes little on it."""
    return sorted(range(len(lengths)), key=lambda chat: lengths[chat])


class Order(NamedTuple):
    """Chats in accelerate's order, which is that of its trainers, each step's own arranged, and behind them what fills the last.

    A step's loss is the mean over its response tokens, whichever of its chats are computed at once. Of several processes
    each takes as many chats: accelerate would fill the last step with the epoch's first ones, which would be learned twice.
    """

    lengths: Sequence[int]
    """Of the chats, in tokens, and of what fills behind them."""
    filling: int
    """How many of these fill."""
    seed: int
    step: int
    """Chats of an optimiser's step, in all processes."""
    at_once: int
    """Of these, in a row."""
    padded: bool
    """A row's chats stand below one another, padded to the longest; else behind one another."""

    def of(self, epoch: int) -> list[int]:
        """The chats of an epoch, counted from 0."""
        from accelerate.data_loader import SeedableRandomSampler

        chats = len(self.lengths) - self.filling
        sampler = SeedableRandomSampler(range(chats), data_seed=self.seed)
        sampler.set_epoch(epoch)
        order = [*sampler, *range(chats, len(self.lengths))]
        return [chat for start in range(0, len(order), self.step) for chat in self._arranged(order, start)]

    def _arranged(self, order: list[int], start: int) -> list[int]:
        step = order[start : start + self.step]
        lengths = [self.lengths[chat] for chat in step]
        return [step[chat] for chat in (alike(lengths) if self.padded else dealt(lengths, self.at_once))]

    def rows(self, epochs: int) -> list[int]:
        """Tokens of every row, where its chats stand behind one another."""
        return [
            sum(self.lengths[chat] for chat in order[start : start + self.at_once])
            for order in map(self.of, range(epochs))
            for start in range(0, len(order), self.at_once)
        ]


def sampler(order: Order, first: int) -> "Sampler[int]":
    """An order as torch takes it, an epoch after the other.

    Args:
        first: epoch, counted from 0. Of a training that is continued in several processes nobody is told.
    """
    from torch.utils.data import Sampler

    class Ordered(Sampler[int]):
        epoch = first

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __len__(self) -> int:
            return len(order.lengths)

        def __iter__(self) -> Iterator[int]:
            yield from order.of(self.epoch)
            self.epoch += 1

    return Ordered()
