"""The native part of kvortex; import ``kvortex`` instead."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Protocol, Self, SupportsIndex, TypeAlias, final, overload, type_check_only

from _typeshed import ReadableBuffer
from typing_extensions import disjoint_base

from kvortex.config import KVortexConfig

__all__ = [
    "Block",
    "BlockGroups",
    "BlockMask",
    "CapacityError",
    "ClosedError",
    "ConfigError",
    "CudaError",
    "CudaUnavailableError",
    "DeviceBuffer",
    "DoubleFreeError",
    "ForeignPointerError",
    "ForkedProcessError",
    "GpuAsyncPool",
    "HostView",
    "InvalidArgumentError",
    "KVortexEngine",
    "KVortexError",
    "KVortexTimeoutError",
    "KeyChain",
    "LayoutError",
    "Lease",
    "Namespace",
    "PagedBlocks",
    "PagedCache",
    "Parts",
    "PinnedBuffer",
    "PinnedHostPool",
    "PoolError",
    "PoolExhaustedError",
    "Promotion",
    "RankMover",
    "RankPlanner",
    "RawTensor",
    "Report",
    "Segments",
    "Ticket",
    "TransferError",
    "UnsupportedError",
    "__version__",
    "build_info",
    "gpu_link",
    "gpus",
    "hash_tokens",
    "inspect_disk",
    "trim_disk",
]

@type_check_only
class _SupportsDLPack(Protocol):
    def __dlpack__(self) -> Any: ...

@type_check_only
class _CudaStream(Protocol):
    @property
    def cuda_stream(self) -> int: ...

_Tensor: TypeAlias = _SupportsDLPack | ReadableBuffer | RawTensor
"""One array: anything with ``__dlpack__`` in host or CUDA memory (torch, numpy, JAX, CuPy) or the buffer protocol."""

_Blocks: TypeAlias = _Tensor | Sequence[_Tensor] | Segments | PagedBlocks
"""n blocks: one array whose leading dimension is n, a list or tuple of n arrays (one per block), Segments, or blocks of
a PagedCache."""

_Stream: TypeAlias = int | _CudaStream | None
"""A CUDA stream by its handle, or an object that has it as ``cuda_stream`` (torch). None: torch's current stream of the
device if torch uses CUDA, else the default stream. Blocks in host memory take None only."""

_Numbers: TypeAlias = _Tensor | Sequence[int]
"""Whole numbers: a list or tuple, or a one-dimensional array of any integer type in host memory."""

_Keys: TypeAlias = ReadableBuffer | list[bytes] | tuple[bytes, ...]
"""n keys: packed bytes of n * 32, or a list or tuple of 32-byte bytes."""

_Field: TypeAlias = bool | int | float | str | bytes | list[_Field] | tuple[_Field, ...] | None

__version__: str

def build_info() -> dict[str, str]:
    """What this library was built as, for bug reports: version, profile, target, abi3."""

class KVortexError(Exception):
    """Base of every error of KVortex. A miss is not an error: it is an answer."""

class ConfigError(KVortexError):
    """A setting is unknown or has a value that cannot work."""

class LayoutError(KVortexError):
    """Blocks of another size or namespace than the engine holds."""

class InvalidArgumentError(KVortexError):
    """An argument cannot work; nothing was changed."""

class CapacityError(KVortexError):
    """Memory is too small, or cannot be had."""

class ClosedError(KVortexError):
    """The engine or pool was shut down."""

class ForkedProcessError(KVortexError):
    """The engine belongs to the parent of this process; create one after the fork."""

class KVortexTimeoutError(KVortexError):
    """A ticket was not done in time; it stays valid and the copy goes on."""

class UnsupportedError(KVortexError):
    """Something that KVortex does not do, such as memory where it does not reach."""

class CudaError(KVortexError):
    """A call of the GPU's driver failed, or the GPU is lost to this process."""

class CudaUnavailableError(KVortexError):
    """There is no GPU or driver that can be used."""

class TransferError(KVortexError):
    """A copy failed; nothing of it is visible."""

class PoolError(KVortexError):
    """Base of the errors of PinnedHostPool."""

class PoolExhaustedError(PoolError):
    """The pool has no free run that is long enough."""

class ForeignPointerError(PoolError):
    """An address that the pool did not give out."""

class DoubleFreeError(PoolError):
    """An address that was given back already."""

@final
class KVortexEngine:
    """Keeps KV blocks of one layout in host memory. Made by ``create``; shared by any number of threads.

    Unless they say otherwise, methods raise ClosedError after ``shutdown``, ForkedProcessError in a forked child, and
    InvalidArgumentError, with nothing changed, for arguments that cannot work.
    """

    @classmethod
    def create(cls, config: KVortexConfig | Mapping[str, object] | None = None, **overrides: object) -> KVortexEngine:
        """Maps the memory. ``config`` None means the environment; keywords win over it.

        Raises ConfigError for settings that cannot work, CapacityError when the memory is not to be had.
        """

    def __enter__(self) -> Self: ...
    def __exit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        """Shuts the engine down."""

    def bind(self, block_size_bytes: int, namespace: Namespace | bytes = b"") -> None:
        """Fixes the bytes of one block and the namespace, which a first save would fix otherwise.

        The same again changes nothing; anything else raises LayoutError. ``namespace`` is a Namespace, its 32-byte
        digest, or ``b""`` for none; the ``namespace`` text of the configuration is mixed in.
        """

    def save_blocks(self, keys: _Keys, data: _Blocks, *, stream: _Stream = None) -> Report:
        """Stores the blocks that are not there yet, block i of ``data`` under key i.

        The GIL is released while bytes are copied; ``data`` must not change meanwhile. Memory of a GPU is read after
        what ``stream`` was given before the call. Raises LayoutError when a block has other than ``block_size_bytes``
        bytes, UnsupportedError for memory of a GPU that the engine does not reach, TransferError when a copy failed.
        """

    @overload
    def load_blocks(self, keys: _Keys, out: None = None, *, stream: _Stream = None) -> list[Block | None]:
        """Returns a read-only Block for each key that is there, in place, and None for the others.

        The blocks of one call are leased together until the last of them, and of the arrays made from them, has ended.
        """

    @overload
    def load_blocks(self, keys: _Keys, out: _Blocks, *, stream: _Stream = None) -> Report:
        """Copies the blocks that are there into ``out`` and leaves the rest of it as it is.

        ``out`` must be writable and must not overlap itself. Memory of a GPU is written after what ``stream`` was given
        before the call, and before what it is given later. Raises as ``save_blocks`` does.
        """

    def check_blocks(self, keys: _Keys) -> BlockMask:
        """Which blocks are there: bit i for key i. Takes no lease and changes no order."""

    def match_prefix(self, keys: _Keys) -> int:
        """Length of the longest prefix that is there, in blocks."""

    def lease_prefix(self, keys: _Keys) -> Lease:
        """Leases the longest prefix that is there, so that it is not evicted before it is loaded."""

    def save_blocks_async(
        self, keys: _Keys, data: _Blocks, *, stream: _Stream = None, after: Sequence[Ticket] = ()
    ) -> Ticket:
        """As ``save_blocks``, but returns at once. ``data`` is kept alive and must stay as it is until it is done.

        GPU memory may be written again in the order of a stream that was put behind the copies by ``fence``.

        Args:
            keys: as for ``save_blocks``.
            data: as for ``save_blocks``.
            stream: as for ``save_blocks``.
            after: tickets of loads that the blocks were computed from. The blocks become visible only once all of those
                have succeeded, and never if one has failed.
        """

    def load_blocks_async(
        self,
        keys: _Keys,
        out: _Blocks,
        *,
        stream: _Stream = None,
        parts: Parts | None = None,
        background: bool = False,
    ) -> Ticket:
        """As ``load_blocks`` with ``out``, but returns at once. ``out`` is the engine's until the ticket is done.

        Blocks that are only on the disk are brought up as well: a load into host memory waits for them, one into a
        GPU's takes what is there and leaves the rest to the next one.

        On a GPU what ``stream`` is given from now on comes after the load, unless one of these is given:

        Args:
            keys: as for ``load_blocks``.
            out: as for ``load_blocks``.
            stream: as for ``load_blocks``.
            parts: new ``Parts`` of a block, layers say, copied in order: streams wait for each by ``Parts.hold``.
            background: no stream waits; such loads go 16 MiB at a time, and others go first.
        """

    def fence(self, blocks: _Blocks, *, stream: _Stream = None) -> None:
        """Makes what ``stream`` is given from now on wait for every unfinished copy that reads or writes ``blocks``.

        For memory that is about to be written. The host waits for copies of host memory, and for no others.
        """

    def wait(self, ticket: Ticket, timeout_ms: int | None = None) -> Report:
        """Waits until a ticket is done, for ever without a timeout; Ctrl-C ends the wait, not the copy.

        Raises KVortexTimeoutError when it is not done in time (it goes on, and can be waited for again), and whatever
        the save or load failed with. Works after ``shutdown`` too.
        """

    def get_stats(self) -> dict[str, Any]:
        """Counters since the engine was created and sizes now. Works after ``shutdown`` too.

        Bytes, bytes per second, microseconds and shares, as the names say: blocks, capacity_blocks, block_size_bytes,
        bytes_used, cpu_pool_size_bytes, hits, misses, cache_hit_rate, saved_blocks, loaded_blocks, duplicate_blocks,
        evictions, refused, failed, in_flight, leased_blocks, save_latency_us and load_latency_us (each p50, p90, p99,
        max and count), save_bandwidth_bytes_per_s, load_bandwidth_bytes_per_s, bytes_saved, bytes_loaded,
        pool_fragmentation, index_bytes, huge_page_bytes, pinned, num_transfer_streams, eviction_watermark,
        eviction_ratio, and disk: None, or the numbers of the disk tier.
        """

    def reset(self) -> int:
        """Forgets every block and returns how many there were. Leased ones vanish when they are released."""

    def flush(self, timeout_ms: int = 5000) -> bool:
        """Waits until the disk tier has kept, or given up, what was saved so far. Returns whether that was in time."""

    def shutdown(self, timeout_ms: int = 5000) -> bool:
        """Refuses new work, waits for copies in flight and lets the memory go once nothing uses it.

        Returns whether all copies ended in time. Can be called again; also runs at exit.
        """

    @property
    def closed(self) -> bool:
        """Whether the engine was shut down."""

    @property
    def device(self) -> str:
        """The GPU whose memory can be passed beside that of the host, "cuda:0" say; "none" without one."""

    @property
    def block_size_bytes(self) -> int | None:
        """Bytes of one block; None until the first save or ``bind``."""

    @property
    def capacity_blocks(self) -> int | None:
        """Blocks that fit; None until the first save or ``bind``."""

@final
class Segments:
    """Blocks whose bytes lie in several tensors: block i is t0[i], t1[i], ... one after the other, each in C order.

    Each part is a tensor with a leading block dimension, or a list with one tensor per block.
    """

    def __new__(cls, tensors: Sequence[_Tensor | Sequence[_Tensor]]) -> Self: ...
    @property
    def tensors(self) -> tuple[Any, ...]:
        """The parts, in the order of a block's bytes."""

    def __len__(self) -> int: ...

@final
class RawTensor:
    """Memory at an address, passed where a tensor is: ``RawTensor(ptr, shape, strides, itemsize, device="cuda:0")``.

    ``strides`` are in items, None for C order without gaps; ``device`` is "cpu", "cuda", "cuda:1" or a torch.device.
    Nobody checks that the memory is there: ``owner`` is kept alive as long as a copy or a PagedCache needs it.
    """

    def __new__(
        cls,
        ptr: int,
        shape: Sequence[int],
        strides: Sequence[int] | None = None,
        itemsize: int = 1,
        *,
        device: object = "cpu",
        owner: object = None,
        writable: bool = True,
    ) -> Self: ...
    @property
    def ptr(self) -> int:
        """Address of item 0."""

    @property
    def itemsize(self) -> int:
        """Bytes of one item."""

@final
class PagedCache:
    """An engine's paged KV memory, described once: one tensor or a list of them, each with a dimension of blocks.

    Block i is the bytes of block i of each tensor, one tensor after the other, each in C order of its other dimensions.
    The tensors are kept alive; any strides will do.
    """

    def __new__(cls, tensors: _Tensor | Sequence[_Tensor], block_dim: int = 0) -> Self: ...
    def blocks(self, block_ids: _Numbers) -> PagedBlocks:
        """Blocks by their numbers, thousands per call."""

    def slots(self, slot_mapping: _Numbers, block_tokens: int = 16) -> PagedBlocks:
        """The blocks of a slot mapping: block * block_tokens + offset for each token of whole blocks, in order."""

    def parts(self) -> Parts:
        """New parts for one load of blocks: one for each tensor, in order."""

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""

    @property
    def block_size_bytes(self) -> int:
        """Bytes of one block, all tensors together."""

@final
class PagedBlocks:
    """Blocks of a PagedCache, to be passed as data or as targets. A target must not name a block twice."""

    def __len__(self) -> int: ...
    @property
    def block_ids(self) -> list[int]:
        """The numbers of the blocks."""

@final
class Report:
    """What came of a save or load."""

    @property
    def kind(self) -> str:
        """ "save" or "load"."""

    @property
    def mask(self) -> BlockMask:
        """Save: which blocks are held after the call. Load: which blocks were copied to the caller."""

    @property
    def blocks(self) -> int:
        """Blocks copied."""

    @property
    def present(self) -> int:
        """Save: blocks that were there already."""

    @property
    def refused(self) -> int:
        """Save: blocks for which there was no room."""

    @property
    def missing(self) -> int:
        """Load: blocks that were not there; their targets are as they were."""

    @property
    def bytes(self) -> int:
        """Bytes copied."""

    @property
    def elapsed_us(self) -> float:
        """From the call to the last byte, in microseconds."""

@final
class BlockMask:
    """One bit per key of the call."""

    def __len__(self) -> int: ...
    def __getitem__(self, key: SupportsIndex, /) -> bool: ...
    def __iter__(self) -> Iterator[bool]: ...
    def __eq__(self, other: object, /) -> bool: ...
    def count(self) -> int:
        """Number of ones."""

    def prefix(self) -> int:
        """Number of ones before the first zero."""

    def all(self) -> bool:
        """Whether every bit is one; true for no bits."""

    def any(self) -> bool:
        """Whether some bit is one."""

    def __bytes__(self) -> bytes:
        """The bits, bit i at i % 8 of byte i // 8."""

    def __int__(self) -> int:
        """The bits as one number, bit i worth 2**i."""

@final
class Ticket:
    """The handle of a save or load that goes on by itself, whether the handle is kept or not."""

    @property
    def done(self) -> bool:
        """Whether it is over, well or not."""

    @property
    def id(self) -> int:
        """Its number."""

@final
class Lease:
    """Blocks that are not evicted until ``release``, the end of a ``with``, or the end of this object."""

    def __len__(self) -> int:
        """Blocks that were leased, also after the release."""

    def release(self) -> None:
        """Ends the lease. Doing it again changes nothing."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _traceback: TracebackType | None
    ) -> None: ...

@disjoint_base
class HostView:
    """Memory of KVortex on the Python side: one dimension of unsigned bytes, by DLPack or the buffer protocol."""

    def __dlpack__(
        self,
        *,
        stream: object | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """A capsule of this memory, without a copy unless ``copy`` is True.

        Only the versioned capsule can say that memory is read-only, so ``max_version`` must be (1, 0) or later; raises
        BufferError otherwise, and for a stream or another device.
        """

    def __dlpack_device__(self) -> tuple[int, int]:
        """Host memory: (1, 0)."""

    if sys.version_info >= (3, 12):
        def __buffer__(self, flags: int, /) -> memoryview: ...

    def __len__(self) -> int: ...
    @property
    def address(self) -> int:
        """Address of the first byte."""

    @property
    def nbytes(self) -> int:
        """Number of bytes."""

@final
class Block(HostView):
    """A block where it lies in the cache, read-only. It is not evicted while this object, or an array of it, lives.

    DLPack can only tell a consumer that memory is read-only. NumPy obeys; PyTorch does not, and writing into such a
    tensor would change what the cache gives to others: pass ``copy=True`` to ``from_dlpack`` for memory of your own.
    """

@final
class Namespace:
    """The digest of everything that makes KV bytes incompatible: ``Namespace(model="...", dtype="bf16", layers=32)``.

    The order of the fields does not matter; values of different types differ. Raises InvalidArgumentError for other
    types, and for ints beyond 64 bits.
    """

    def __new__(cls, **fields: _Field) -> Self: ...
    @property
    def digest(self) -> bytes:
        """The 32 bytes."""

    def hex(self) -> str:
        """The digest as 64 hexadecimal digits."""

    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@final
class KeyChain:
    """Names the blocks of one prompt as its tokens arrive.

    Each key is a SHA-256 over the key before it and the block's tokens, so equal blocks at different places differ.
    ``extra`` is what the whole request adds to its identity: the digest of a LoRA, a tenant's salt.
    """

    def __new__(cls, namespace: Namespace | bytes, block_tokens: int = 16, extra: bytes = b"") -> Self: ...
    def extend(self, tokens: _Numbers, extra: bytes = b"") -> bytes:
        """Adds token ids and returns the packed keys of the blocks that became full.

        ``extra``, such as the digest of an image, is mixed into exactly those. Raises InvalidArgumentError for an id
        outside 0 to 2**32 - 1 or more than 2**24 tokens; the chain is then unchanged.
        """

    @property
    def keys(self) -> bytes:
        """The packed keys of all full blocks."""

    @property
    def num_tokens(self) -> int:
        """Number of tokens added so far."""

    @property
    def block_tokens(self) -> int:
        """Tokens of one block."""

    def __len__(self) -> int:
        """Number of full blocks."""

    def copy(self) -> KeyChain:
        """A chain that goes on from here by itself."""

def inspect_disk(folder: str, blocks: bool = False, wipe: bool = False) -> dict[str, Any]:
    """What a folder keeps that no engine uses: block_bytes, file_bytes, taken_bytes, openings, places, empty, stale,
    bad_headers, bad_blocks, and owners: a list of namespace, row, world, blocks, oldest, newest.

    With ``blocks`` every block is read and compared with its digest; with ``wipe`` what is not sound is forgotten.
    """

def trim_disk(folder: str, size_bytes: int | None = None) -> tuple[int, int]:
    """Cuts a folder's file to a size, or to its last block. Its length before and after."""

def gpus() -> list[dict[str, Any]]:
    """What is known of each GPU that this process sees, in order. Takes a context on each.

    ordinal, name, bus_id, driver_cuda, compute_capability, memory_bytes, memory_free_bytes, multiprocessors, maps_host,
    numa_node (None where the system does not say). Raises CudaUnavailableError without a driver or a GPU.
    """

def gpu_link(ordinal: int = 0, fresh: bool = False) -> dict[str, dict[str, Any]]:
    """What the link of a GPU does, as copies are chosen by it: under "store" and "load" the same names each.

    link_bytes_per_s (one long copy), kernel_bytes_per_s (the copy kernel), copy_us and staged_us (what a copy and a
    staged transfer cost beyond their bytes), methods (the way chosen for 1,000 blocks of 2 MiB, by the bytes of a
    fragment, for a load where it is awaited as a whole). ``fresh`` measures anew. Raises CudaUnavailableError without
    such a GPU.
    """

def hash_tokens(namespace: Namespace | bytes, tokens: _Numbers, block_tokens: int = 16, extra: bytes = b"") -> bytes:
    """The packed keys of all full blocks of a prompt: ``KeyChain(namespace, block_tokens, extra).extend(tokens)``."""

@final
class Parts:
    """The parts of one load into GPU memory, so that the first layer can be used while the last is still on its way.

    Consecutive ranges of a block's bytes that end at ``ends_bytes``, ascending, the last at the end of the block. For
    one load only.
    """

    def __new__(cls, ends_bytes: Sequence[int]) -> Self: ...
    def hold(self, index: int, *, stream: _Stream = None) -> None:
        """Makes what ``stream``, torch's current one by default, is given from now on wait for part ``index``, from 0.

        The host does not wait. Raises InvalidArgumentError before the load, TransferError if copies failed to start.
        """

    def __len__(self) -> int: ...

@final
class GpuAsyncPool:
    """Stream-ordered memory of a GPU, in pieces of any size, from a pool of its own: nobody waits for memory.

    Args:
        device: "cuda" or "cuda:0".
        capacity_bytes: the most that is given out at once; None for all that the GPU has.
        release_threshold_bytes: what the pool keeps of the GPU's memory when pieces are given back.

    A stream is a handle, an object with ``cuda_stream``, or None for torch's current one. It must live as long as the
    pieces that were used in it. Raises CudaUnavailableError without such a GPU.
    """

    def __new__(
        cls, device: str = "cuda", *, capacity_bytes: int | None = None, release_threshold_bytes: int = 0
    ) -> Self: ...
    def allocate(self, nbytes: int, *, stream: _Stream = None) -> DeviceBuffer:
        """``nbytes`` with undefined content, for what ``stream`` is given from now on.

        Raises PoolExhaustedError when the pool or the GPU has no more, ClosedError if closed.
        """

    def free(self, address: int) -> None:
        """Gives back the buffer at ``address``, in the order of the streams that it was handed to.

        Raises ForeignPointerError or DoubleFreeError for any other address; InvalidArgumentError while views exist.
        """

    def stats(self) -> dict[str, Any]:
        """Bytes: capacity (None without a limit), used, peak, reserved. Counts: live, allocations, failures."""

    def trim(self, keep_bytes: int = 0) -> None:
        """Returns to the GPU what is not given out, all but ``keep_bytes``."""

    def close(self) -> list[tuple[int, int]]:
        """Ends allocation and returns what was still allocated: (address, nbytes). Buffers that live on stay valid."""

    @property
    def device(self) -> str:
        """The GPU, "cuda:0" say."""

@final
class DeviceBuffer:
    """Memory of a GpuAsyncPool: bytes of one dimension, by DLPack.

    It goes back on ``free``, or when this and all tensors of it have ended, in the order of the streams that it was
    handed to.
    """

    @property
    def address(self) -> int:
        """Address of the first byte, on the GPU."""

    @property
    def nbytes(self) -> int:
        """Number of bytes."""

    def __dlpack__(
        self,
        *,
        stream: _Stream = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """A capsule, which ``stream``, the consumer's, may use from now on; -1 leaves the order to the caller."""

    def __dlpack_device__(self) -> tuple[int, int]:
        """(2, number of the GPU)."""

    def free(self, *, stream: _Stream = None) -> None:
        """Gives the memory back once ``stream`` has passed what it was given so far.

        Raises DoubleFreeError the second time, InvalidArgumentError while views exist.
        """

    def __len__(self) -> int: ...

@final
class PinnedHostPool:
    """Memory of any size from one region. Best fit; neighbours that are given back grow together.

    Page-locked for the GPU that ``device`` names ("auto", "none", "cuda" or "cuda:0", as in KVortexConfig), plain
    memory where there is none.
    """

    def __new__(cls, capacity_bytes: int, alignment: int = 128, *, device: str = "auto") -> Self: ...
    def allocate(self, nbytes: int) -> PinnedBuffer:
        """``nbytes`` of memory. Raises PoolExhaustedError when no free run is long enough, ClosedError if closed."""

    def free(self, address: int) -> None:
        """Gives back the buffer at ``address``.

        Raises ForeignPointerError or DoubleFreeError for any other address; InvalidArgumentError while views exist.
        """

    def stats(self) -> dict[str, Any]:
        """Bytes: capacity, used, free, peak, largest_free. Counts: live, allocations, failures. Also fragmentation."""

    @property
    def pinned(self) -> bool:
        """Whether the memory is page-locked for a GPU."""

    def close(self) -> list[tuple[int, int]]:
        """Ends allocation and returns what was still allocated: (address, nbytes). Buffers that live on stay valid."""

@final
class PinnedBuffer(HostView):
    """Writable memory of a PinnedHostPool. It goes back on ``free``, or when this and all arrays of it have ended."""

    def free(self) -> None:
        """Gives the memory back now. Raises DoubleFreeError the second time, InvalidArgumentError while views exist."""

@final
class BlockGroups:
    """Groups of layers that an engine gives blocks of their own, all with the same number of tokens.

    Args:
        block_tokens: tokens of a block.
        windows: for each group, how many tokens a token sees, itself among them; 0 for all.
        look_ahead: the groups whose last position of a block holds something of the token behind it.
    """

    def __new__(cls, block_tokens: int, windows: Sequence[int], look_ahead: Sequence[int] = ()) -> Self: ...
    def keys(self, group: int, hashes: _Keys) -> bytes:
        """The packed keys of a group's blocks, which the engine names ``hashes``."""

    def first_read(self, group: int, blocks: int) -> int:
        """The first block of a group that the tokens behind ``blocks`` blocks still read."""

    def __len__(self) -> int: ...

@final
class RankPlanner:
    """Decides what the ranks of one engine load and store, in this process or in others.

    Every plan must reach every rank's ``RankMover`` once, in the order of tickets. What came of it the planner learns
    by itself, through memory that the processes share; a block is visible only once every storing rank has it.

    Args:
        engine_id: names the engine to its processes; one planner and one mover for each rank.
        ranks: how many.
        cpu_pool_size_bytes: of each rank, or of the one row.
        block_size_bytes: bytes of one block on one rank.
        namespace: as for ``KVortexEngine.bind``; each rank must have the same.
        rows: ``private``: each rank has memory of its own; ``open``: and the planner's process can map it; ``one``: all
            ranks load what the first one stores, since their bytes are the same.
        storing_ranks: only the first so many store; all by default.
        eviction_watermark: as in KVortexConfig.
        eviction_ratio: as in KVortexConfig.
        disk: a configuration whose ``disk_*`` knobs say where blocks go besides memory; not with ``private`` rows.
    """

    def __new__(
        cls,
        engine_id: str,
        ranks: int,
        *,
        cpu_pool_size_bytes: int,
        block_size_bytes: int,
        namespace: Namespace | bytes,
        rows: Literal["private", "open", "one"] = "private",
        storing_ranks: int | None = None,
        eviction_watermark: float = 0.8,
        eviction_ratio: float = 0.2,
        disk: KVortexConfig | None = None,
    ) -> Self: ...
    def ready(self) -> bool:
        """Whether every rank is there; nothing must be promised before. Raises when one has another configuration.

        The first time that it is so the disk is opened. One that cannot be is a warning.
        """

    def lease_prefix(self, keys: _Keys) -> Lease:
        """Leases the longest prefix that is there."""

    def lease_groups(self, groups: BlockGroups, hashes: _Keys, first: int, most: int) -> tuple[int, Lease]:
        """The blocks of the longest hit of all groups, 0 for none, and a lease on what it needs beyond ``first``.

        ``hashes`` name the blocks from ``first`` on; a hit has at most ``most``. The lease has block after block, of
        each the groups in order.
        """

    def reach_groups(self, groups: BlockGroups, hashes: _Keys, first: int, most: int) -> tuple[int, bytes] | None:
        """The blocks of the longest hit of what is in memory and below, 0 for none, and the keys that it needs.

        The keys are for ``find_below``. None if nothing is below. The rest as for ``lease_groups``.
        """

    def plan_load(self, lease: Lease, *, background: bool = False) -> tuple[int, bytes]:
        """Plans to load the blocks of ``lease``, which is used up: ticket, and packed slots of 32 bits."""

    def plan_store(
        self, keys: _Keys, rests_on: Sequence[int] = (), *, terms: Sequence[tuple[int, int, int | None]] = ()
    ) -> tuple[int, bytes, bytes] | None:
        """Plans to store what is not there: ticket, packed positions among ``keys``, packed slots. None for nothing.

        The blocks become visible once the loads ``rests_on``, and all loads inside steps, have succeeded as well.
        ``terms`` are runs that cover the keys: how many, their priority (0 low, 1 normal, 2 high), and until which
        millisecond of a clock of the caller's they are kept, or None. What is there already is kept on the higher
        priority and for the longer time of all who stored it.
        """

    def expire(self, now_ms: int) -> int:
        """Forgets what is kept until ``now_ms`` or before, at most a quarter of a second late. How many blocks."""

    def watch(self) -> None:
        """Begins to note what ``take_changes`` tells; what is there now has just come."""

    def take_changes(self) -> tuple[bytes, bytes, list[tuple[int, bool]]]:
        """Since the last call: packed keys that became visible, packed keys forgotten, stores that have ended.

        A block that came and went, or went and came again, is in neither, so there is never more to tell than blocks
        told of and blocks there. Nothing is told of blocks that are kept for a time only. What a store made visible
        comes with its end: ticket, whether it succeeded.
        """

    def counts(self) -> dict[str, int]:
        """capacity_blocks, used_blocks, stored_blocks, failed_stores, refused_blocks, evicted_blocks, expired_blocks.

        Cheap enough for every step.
        """

    def plan_store_groups(
        self,
        groups: BlockGroups,
        hashes: _Keys,
        blocks: bytes,
        rests_on: Sequence[int] = (),
        *,
        terms: Sequence[tuple[int, int, int | None]] = (),
    ) -> tuple[int, bytes, bytes] | None:
        """As ``plan_store``, with one packed block of each group for each of ``hashes``, where 0 is none.

        Returns the ticket, the packed blocks to be stored, and their packed slots. ``terms`` are runs that cover the
        hashes.
        """

    def poll(self) -> list[tuple[int, bool]]:
        """Makes visible what was stored. Loads that have ended on every rank since: ticket, whether it succeeded."""

    def find_below(self, keys: _Keys) -> Promotion | None:
        """Blocks of a prefix that are on the disk only; None if that would not make it longer. Reads nothing yet."""

    def promote(self, promotion: Promotion) -> None:
        """Starts to bring them up, and returns at once."""

    def flush(self, timeout_ms: int = 5000) -> bool:
        """Waits until what became visible so far is on the disk or given up; whether that was in time."""

    def leave_disk(self, timeout_ms: int = 5000) -> bool:
        """Leaves the disk for good, with what it keeps; whether what was under way has ended in time."""

    def reset(self) -> int:
        """Forgets every block, those being stored and those on the disk too, and returns how many were visible."""

    def get_stats(self) -> dict[str, Any]:
        """capacity_blocks, used_blocks, blocks, leased_blocks, evictions, in_flight, index_bytes.

        And ``disk``: what ``KVortexEngine.get_stats`` says of it, or None.
        """

@final
class Promotion:
    """Blocks of a prefix that ``RankPlanner.find_below`` found below memory.

    Until ``release`` those that have come, and those of the prefix that were in memory before, are not evicted.
    """

    def __len__(self) -> int: ...
    def among(self, count: int) -> int:
        """How many of the first ``count`` blocks that were asked about are wanted from below."""

    @property
    def pending(self) -> bool:
        """Whether blocks may still come in time."""

    @property
    def late(self) -> bool:
        """Whether its time was over before all had come."""

    @property
    def seconds(self) -> float | None:
        """What it should take, by how fast blocks came up lately; None if that is not known."""

    def release(self) -> None:
        """Lets the blocks be evicted. Doing it again changes nothing."""

@final
class RankMover:
    """The memory and the copies of one rank. Plans must be passed in the order of their tickets.

    ``config.cpu_pool_size_bytes`` is this rank's, or the one row's; the rest as for ``RankPlanner``. ``layout`` is a
    digest, 32 bytes, of how the KV lies: without it nothing goes to a disk.
    """

    def __new__(
        cls,
        config: KVortexConfig,
        engine_id: str,
        ranks: int,
        rank: int,
        *,
        block_size_bytes: int,
        namespace: Namespace | bytes,
        rows: Literal["private", "open", "one"] = "private",
        layout: bytes | None = None,
    ) -> Self: ...
    def store(self, ticket: int, slots: bytes, blocks: PagedBlocks) -> None:
        """Starts to store ``blocks`` into ``slots``, after what torch's current stream was given so far."""

    def load(self, ticket: int, slots: bytes, blocks: PagedBlocks, *, parts: Parts | None = None) -> None:
        """Loads ``blocks`` from ``slots``: before what torch's current stream is given next; host memory is waited for.

        What fails at once is tried once more before TransferError.
        """

    def load_later(self, ticket: int, slots: bytes, blocks: PagedBlocks) -> None:
        """Starts to load ``blocks`` from ``slots`` in the background."""

    def fence(self, blocks: PagedBlocks) -> None:
        """As ``KVortexEngine.fence``, for torch's current stream."""

    def ended_loads(self) -> list[tuple[int, bool]]:
        """The loads that have ended since the last call: ticket, and whether it succeeded."""

    def ended_later(self) -> list[tuple[int, bool]]:
        """As ``ended_loads``, of those in the background."""

    def ended_stores(self) -> list[tuple[int, bool]]:
        """As ``ended_loads``, of stores."""

    def shutdown(self, timeout_ms: int = 5000) -> bool:
        """Refuses new copies and waits for those under way; whether all ended in time."""

    @property
    def stores(self) -> bool:
        """Whether this rank stores: not where another one stores the same bytes for all."""

    @property
    def device(self) -> str:
        """The GPU whose memory can be passed, "cuda:0" say; "none" without one."""

    @property
    def pinned(self) -> bool:
        """Whether the memory is page-locked."""
