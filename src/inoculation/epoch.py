"""The order in which an epoch's chats are trained, for one process and for several alike."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.utils.data import Sampler


def shuffled(rows: int, filling: int, seed: int) -> "Sampler[int]":
    """Rows in accelerate's order, which is that of its trainers, and what fills the last step behind them.

    Several processes take as many rows each: accelerate would fill the last step with the epoch's first chats, which would
    be learned twice.

    Args:
        filling: how many more; the numbers from `rows` on.
    """
    from accelerate.data_loader import SeedableRandomSampler
    from torch.utils.data import Sampler

    class Shuffled(Sampler[int]):
        def __init__(self) -> None:
            self.order = SeedableRandomSampler(range(rows), data_seed=seed)

        def set_epoch(self, epoch: int) -> None:
            self.order.set_epoch(epoch)

        def __len__(self) -> int:
            return rows + filling

        def __iter__(self) -> Iterator[int]:
            yield from self.order
            yield from range(rows, rows + filling)

    return Shuffled()
