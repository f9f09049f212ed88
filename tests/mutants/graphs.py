"""Wrong gradients that the conformance suite must catch: torch's functions, the graph changed and no number."""

import dataclasses

import torch
from mutants.build import Wrapper

from fwpkm import schedule
from fwpkm.backends import torch as backend
from fwpkm.containers import Memory
from fwpkm.tokens import Tokens


def _same(tokens):
    return tokens


def by_window(change):
    """``apply`` and ``flush`` of torch, a write at a time; ``change(cfg, write, before)`` gives what each one leaves.

    ``write(cfg, state, weigh)`` is the state after a window's tokens, or after a flush, of any configuration and state;
    ``weigh`` is a function of the tokens that are written.
    """

    def apply(cfg, state, query, value, gate=None, mask=None, update=True):
        whole, tokens, outputs = (cfg, state, query, value, gate, mask, update), Tokens(query, value, gate, mask), []
        if not update or not tokens.length:
            return backend.apply(*whole)
        for window in schedule.windows(cfg, int(state.position[0]), tokens.length):
            part = tokens.slice(window.start, window.stop)

            def write(cfg, state, weigh=_same, part=part):
                return backend.apply(cfg, state.replace_pending(weigh(state.pending)), *weigh(part))[1]

            outputs.append(backend.apply(cfg, state, *part)[0])
            state = change(cfg, write, state) if window.writes else write(cfg, state)
        return torch.cat(outputs, 1), state, backend.apply(*whole)[2]

    def flush(cfg, state):
        def write(cfg, state, weigh=_same):
            return backend.flush(cfg, state.replace_pending(weigh(state.pending)))[0]

        return change(cfg, write, state), backend.flush(cfg, state)[1]

    return {"apply": apply, "flush": flush}


def right(cfg, write, before):
    """What torch writes, graph and all."""
    return write(cfg, before)


def _derived_from(after, other):
    """The numbers of a state, with another's graph of its values."""
    values, graph = after.memory.values, other.memory.values
    return after._replace(memory=Memory(after.memory.keys, graph + (values - graph).detach()))


def _as_if(**fields):
    """Values derived as those of another configuration."""

    def change(cfg, write, before):
        return _derived_from(write(cfg, before), write(dataclasses.replace(cfg, **fields), before))

    return change


def _constant_kappa(cfg, write, before):
    if cfg.write_scale != "normalized":
        return write(cfg, before)

    def weigh(tokens):
        kappa = 1 / backend.lookup(cfg, before.memory, tokens.query).weights.detach().square().sum(-1)
        return tokens._replace(gate=kappa if tokens.gate is None else kappa * tokens.gate)

    return _derived_from(write(cfg, before), write(dataclasses.replace(cfg, write_scale="unit"), before, weigh))


def _detached(name):
    def change(cfg, write, before):
        after = write(cfg, before)
        return after._replace(memory=after.memory._replace(**{name: getattr(after.memory, name).detach()}))

    return change


def _detached_gate(cfg, state, gate=None, **others):
    return backend.apply(cfg, state, gate=None if gate is None else gate.detach(), **others)


def _detached_pending(cfg, state, **others):
    output, state, trace = backend.apply(cfg, state, **others)
    return output, state.replace_pending(state.pending.map(torch.detach)), trace


GRADIENTS = [
    Wrapper("kappa's gradient dropped", backend, "grad query", by_window(_constant_kappa)),
    Wrapper("no gradient from a write to the gate", backend, "grad gate", {"apply": _detached_gate}),
    Wrapper("no gradient through written values", backend, "grad value", by_window(_detached("values"))),
    Wrapper("no gradient through written keys", backend, "grad keys", by_window(_detached("keys"))),
    Wrapper("clipped elements pass gradients", backend, "grad value", by_window(_as_if(grad_clip=None))),
    Wrapper("decay's gradient dropped", backend, "grad values", by_window(_as_if(weight_decay=0.0))),
    Wrapper("no gradient through pending tokens", backend, "grad value", {"apply": _detached_pending}),
]
