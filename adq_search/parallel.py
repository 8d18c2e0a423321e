"""One network trained by several processes at once, each on its share of every batch.

The processes hold the same network and see the same batches in the same order; each computes on
its own samples. Gradients, batch statistics and losses are summed over them, so that their step is
the step of one process on the whole batch, within rounding.

Gradients travel in one piece after the backward pass, and the first process's buffers with them: a
codebook moves by sums over weights whose order may differ between processes (compiled or not,
another processor), and would drift apart. torch's `DistributedDataParallel` [Li2020] takes means
over processes, which is wrong for shares of unequal size, and does not train a network with a
parameter that gets no gradient unless it searches every graph for such.

Messages are JSON and safetensors: nothing is unpickled.

References:
    [Li2020] PyTorch Distributed: Experiences on Accelerating Data Parallel Training, VLDB 2020.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor, nn

from adq_search.errors import ParallelError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Value = TypeVar("Value")
Samples = TypeVar("Samples", bound=NamedTuple)

#: How long a process waits for a message. Long, since the first one may wait for its study; that a
#: process has ended is noticed at once.
_IDLE = timedelta(days=30)


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes that train one network together, as one of them sees them.

    `Ranks.of` makes it; `ALONE` is a process by itself, for which all of this does nothing.

    Attributes:
        index: Which of them this process is; 0 is the first, which decides for all.
        size: How many they are.
        group: Over which tensors are summed; None alone.
        words: Over which messages go, on the CPU and with patience; None alone.
    """

    index: int = 0
    size: int = 1
    group: ProcessGroup | None = None
    words: ProcessGroup | None = None

    @classmethod
    def of(cls, group: ProcessGroup | None = None) -> Ranks:
        """Return the processes of a group; each of them must call this.

        Args:
            group: Of an initialised `torch.distributed`; None for all its processes. How long a
                process waits for a silent one in the middle of a trial is this group's timeout.

        Raises:
            ParallelError: `torch.distributed` is not initialised.
        """
        if not (dist.is_available() and dist.is_initialized()):
            msg = (
                "Data-parallel trials need a process group, but there is none. Start with torchrun "
                "and call torch.distributed.init_process_group first."
            )
            raise ParallelError(msg)
        members = dist.get_process_group_ranks(group)
        words = dist.new_group(
            members, timeout=_IDLE, backend="gloo", use_local_synchronization=True
        )
        assert isinstance(words, dist.ProcessGroup)  # this process is a member
        return cls(dist.get_rank(group), len(members), group or dist.group.WORLD, words)

    @property
    def is_first(self) -> bool:
        """Whether this process decides, and alone speaks to study and disk."""
        return self.index == 0

    def own(self, n: int) -> slice:
        """Return which of `n` samples are this process's.

        Shares differ by one sample at most; of fewer samples than processes, some get none.
        """
        return slice(n * self.index // self.size, n * (self.index + 1) // self.size)

    def share_of(self, batch: Samples) -> tuple[Samples, float]:
        """Return this process's samples of a batch, and which part of all they are, 0 to 1.

        Args:
            batch: Tensors with the samples, one at least, along the first dimension.
        """
        if self.size == 1:
            return batch, 1.0
        n = len(batch[0])
        own = self.own(n)
        return type(batch)(*(values[own] for values in batch)), (own.stop - own.start) / n

    @torch.no_grad()
    def add_gradients_(self, network: nn.Module) -> None:
        """Sum gradients over the processes, and take the first one's buffers, in place."""
        if self.size == 1:
            return
        summed = [p.grad for p in network.parameters() if p.grad is not None]
        taken = [b for b in network.buffers() if b.is_floating_point()]
        mine = taken if self.is_first else [torch.zeros_like(b) for b in taken]
        flat = torch.cat([t.reshape(-1) for t in (*summed, *mine)])
        self._sum_(flat)
        tensors = summed + taken
        for tensor, piece in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(piece.view(tensor.shape))

    def total(self, values: Tensor) -> Tensor:
        """Return the sum of `values` over the processes, the same bits in each of them."""
        if self.size == 1:
            return values
        summed = values.detach().clone()
        self._sum_(summed)
        return summed

    def gathered(self, values: Tensor) -> Tensor:
        """Return the `values` of every process, # shape: (size, *values.shape)."""
        everyone = [torch.empty_like(values) for _ in range(self.size)]
        with self._together():
            dist.all_gather(everyone, values.contiguous(), group=self.group)
        return torch.stack(everyone)

    def decided(self, decide: Callable[[], Value]) -> Value:
        """Return what the first process decides; its error ends the others too.

        Args:
            decide: Called in the first process alone; what it returns must be JSON.

        Raises:
            ParallelError: In the others, where the first one failed.
        """
        if self.size == 1:
            return decide()
        if not self.is_first:
            return self.heard()  # type: ignore[no-any-return]
        try:
            value = decide()
        except BaseException as error:
            self.tell_end(error)
            raise
        self.tell(value)
        return value

    def tell(self, value: Any) -> None:
        """Send plain JSON from the first process to all others, which `heard` it."""
        self._send(json.dumps({"value": value}).encode())

    def tell_end(self, error: BaseException | None = None) -> None:
        """Send word from the first process that it goes no further, and why."""
        reason = None if error is None else f"{type(error).__name__}: {error}"
        self._send(json.dumps({"end": reason}).encode())

    def heard(self) -> Any:
        """Return the next message of the first process.

        Raises:
            Ended: It goes no further, as it had said it might.
            ParallelError: It failed, or is gone.
        """
        message = json.loads(self._send(b""))
        if "end" not in message:
            return message["value"]
        if message["end"] is None:
            raise Ended
        msg = f"The first process failed, and this one ends with it: {message['end']}"
        raise ParallelError(msg)

    def copied(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the first process's tensors in all processes, on the CPU.

        Args:
            tensors: Read in the first process alone.
        """
        if self.size == 1:
            return dict(tensors)
        own = {k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}
        return load(self._send(save(own) if self.is_first else b""))

    def check_same(self, what: str, text: str) -> None:
        """Make sure that all processes have the same.

        Args:
            what: Of what, for the error's text: `policy`.
            text: That which must be the same.

        Raises:
            ParallelError: Some have another; in all processes.
        """
        if self.size == 1:
            return
        digest = hashlib.sha256(text.encode()).digest()
        found = self.gathered(torch.frombuffer(bytearray(digest), dtype=torch.uint8))
        others = [i for i in range(1, self.size) if not torch.equal(found[i], found[0])]
        if others:
            msg = (
                f"The processes of a data-parallel trial have one {what}, but "
                f"{', '.join(map(str, others))} of 0 to {self.size - 1} came with another than 0. "
                "Choose in process 0 alone, and let the others `follow`."
            )
            raise ParallelError(msg)

    def _sum_(self, values: Tensor) -> None:
        with self._together():
            dist.all_reduce(values, group=self.group)

    def _send(self, content: bytes) -> bytes:
        """Send bytes from the first process; return them in all."""
        size = torch.tensor([len(content)])
        with self._together():
            dist.broadcast(size, group=self.words, group_src=0)
            data = torch.empty(int(size), dtype=torch.uint8)
            if self.is_first:
                data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            dist.broadcast(data, group=self.words, group_src=0)
        return data.numpy().tobytes()

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Say what it means when a collective fails."""
        try:
            yield
        except RuntimeError as error:
            detail = " ".join(str(error).split())
            msg = (
                f"Process {self.index} of 0 to {self.size - 1} lost the others in a data-parallel "
                f"trial: one has ended or is silent ({detail[:160]}). Look for the first error "
                "above, and start again; nothing finished is lost."
            )
            raise ParallelError(msg) from error


class Ended(Exception):  # noqa: N818  # no error: the first process has nothing more to do
    """The first process goes no further."""


ALONE = Ranks()
