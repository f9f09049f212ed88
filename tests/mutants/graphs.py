"""Wrong gradients that the conformance suite must catch: torch's functions, the graph changed and no number."""

import dataclasses

import torch
from mutants.build import Wrapper

from fwpkm.backends import torch as backend
from fwpkm.containers import Memory
from fwpkm.tokens import Tokens


def _same(tokens):
    return tokens


def by_window(change):
    """``apply`` and ``flush`` of torch, a time step at a time; ``change(cfg, write, before)`` is what a write leaves.

    ``write(cfg, state, weigh)`` is the state after a time step, or after a flush, of any configuration and state;
    ``weigh`` is a function of the tokens that are written. Packed calls are right.
    """

    def apply(cfg, state, query, value, gate=None, mask=None, cu_seqlens=None, update=True):
        whole, tokens, outputs = (cfg, state, query, value, gate, mask), Tokens(query, value, gate, mask), []
        returned = backend.apply(*whole, cu_seqlens=cu_seqlens, update=update)
        if not update or not tokens.length or cu_seqlens is not None or isinstance(state, Memory):
            return returned
        for t in range(tokens.length):
            part = tokens.slice(t, t + 1)

            def write(cfg, state, weigh=_same, part=part):
                return backend.apply(cfg, state.replace_pending(weigh(state.pending)), *weigh(part))[1]

            output, _, trace = backend.apply(cfg, state, *part)
            outputs.append(output)
            state = change(cfg, write, state) if trace.writes.any() else write(cfg, state)
        return torch.cat(outputs, 1), state, returned[2]

    def flush(cfg, state, rows=None):
        def write(cfg, state, weigh=_same):
            return backend.flush(cfg, state.replace_pending(weigh(state.pending)), rows)[0]

        return change(cfg, write, state), backend.flush(cfg, state, rows)[1]

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
    return output, state and state.replace_pending(state.pending.map(torch.detach)), trace


def _masked_gradient(cfg, state, query, mask=None, **others):
    output, *rest = backend.apply(cfg, state, query=query, mask=mask, **others)
    if mask is not None:
        leak = torch.where(torch.isfinite(query), query - query.detach(), 0).mean(-1, keepdim=True)
        output = output + leak * ~mask[..., None]
    return output, *rest


GRADIENTS = [
    Wrapper("kappa's gradient dropped", backend, "grad query", by_window(_constant_kappa)),
    Wrapper("no gradient from a write to the gate", backend, "grad gate", {"apply": _detached_gate}),
    Wrapper("no gradient through written values", backend, "grad value", by_window(_detached("values"))),
    Wrapper("no gradient through written keys", backend, "grad keys", by_window(_detached("keys"))),
    Wrapper("clipped elements pass gradients", backend, "grad value", by_window(_as_if(grad_clip=None))),
    Wrapper("decay's gradient dropped", backend, "grad values", by_window(_as_if(weight_decay=0.0))),
    Wrapper("a gradient passes through masked tokens", backend, "grad query", {"apply": _masked_gradient}),
    Wrapper("no gradient through pending tokens", backend, "grad value", {"apply": _detached_pending}),
]
