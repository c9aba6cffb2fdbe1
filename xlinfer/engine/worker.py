"""The device's side of a step: it owns what lies there and runs programs, as it is told by calls.

A call is all that a step needs from the host, so it is also all that crosses between hosts.
"""

from typing import Any, NamedTuple, Protocol

import jax

from xlinfer.compile import Executables, Key
from xlinfer.engine.ready import Ready
from xlinfer.kvcache import Cache
from xlinfer.mesh import on_mesh
from xlinfer.sampling import Slots, empty_slots, slot_places


class Call(NamedTuple):
    """One program to run, and what it takes from the host."""

    program: str  # of xlinfer.compile.Executables
    bucket: int  # 0 where there is one
    inputs: tuple[Any, ...]  # numpy: its last arguments, after those that lie on the device


# How many of a program's arguments lie on the device; what follows comes from the host.
ON_DEVICE = {"forward": 3, "decode": 3, "encode": 2, "sample": 3, "score": 2, "pool": 1, "admit": 1}


def host_inputs(programs: Executables) -> dict[Key, Any]:
    """The `inputs` of each program's calls, as ShapeDtypeStructs."""
    found = {}
    for name, on_device in ON_DEVICE.items():
        held = getattr(programs, name)
        for bucket, program in held.items() if isinstance(held, dict) else [(0, held)]:
            args, _ = program.args_info
            found[name, bucket] = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tuple(args[on_device:])
            )
    return found


class Executor(Protocol):
    """Runs calls on the devices: a Worker on those of this host, or one that leads other hosts."""

    @property
    def params(self) -> tuple[jax.Array, ...]: ...
    def run(self, call: Call) -> Any: ...
    def replace_params(self, params: tuple[jax.Array, ...]) -> None: ...


class Worker:
    """Owns everything that lives on the device: parameters, cache and slots."""

    def __init__(self, ready: Ready):
        self.params = ready.params
        self._run = ready.executables
        self._kv: Cache = self._run.allocate()
        slots = empty_slots(ready.plan.max_num_seqs + 1, ready.vocab_size)
        places = slot_places(ready.mesh, ready.vocab_size)
        self._slots: Slots = jax.tree.map(on_mesh, slots, places)
        # Of the latest forward: what `sample` and `score` read.
        self._hidden_TD = self._last_RD = None

    def replace_params(self, params: tuple[jax.Array, ...]) -> None:
        """Each in its predecessor's place; what lies there already is not copied."""
        self.params = tuple(
            jax.device_put(new, old.sharding) for new, old in zip(params, self.params, strict=True)
        )

    def run(self, call: Call) -> Any:
        """Dispatch it; returns before the device is done. The arrays given back are whole on every
        device."""
        programs, bucket, inputs = self._run, call.bucket, call.inputs
        match call.program:
            case "decode":
                self._kv, self._slots, sampled = programs.decode[bucket](
                    self.params, self._kv, self._slots, *inputs
                )
                return sampled
            case "forward":
                self._hidden_TD = self._last_RD = None
                self._kv, self._hidden_TD, self._last_RD = programs.forward[bucket](
                    self.params, self._kv, self._slots, *inputs
                )
            case "sample":
                self._slots, sampled = programs.sample(
                    self.params, self._slots, self._last_RD, *inputs
                )
                return sampled
            case "score":
                return programs.score(self.params, self._hidden_TD, *inputs)
            case "pool":
                return programs.pool(self._hidden_TD, *inputs)
            case "admit":
                self._slots = programs.admit(self._slots, *inputs)
            case "encode":
                self._kv = programs.encode[bucket](self.params, self._kv, *inputs)
            case unknown:
                raise KeyError(f"no program is called {unknown!r}")
        return None
