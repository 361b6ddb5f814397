"""Low-overhead autograd registration for custom ops, and their rules for ``torch.func``.

A registered op has first-order derivatives in reverse mode and a batching rule, at every level of nested transforms.
What it does not have, forward mode and second order, is refused by name: left out without a word it would be a wrong
number.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

# (arguments of a call, positions of those that vmap maps) -> positions of the tensors with a leading batch dim whose
# elements never enter the same output. If they include all that is mapped, vmap joins its dim to the batch.
Samples = Callable[[tuple, Collection[int]], Collection[int]]


def register(
    op: str, name: str, setup_context: Callable, backward: Callable, samples: Samples, backward_samples: Samples
) -> None:
    """As ``torch.library.register_autograd(name, backward, setup_context=setup_context)``, but faster, and for
    ``torch.func`` too.

    PyTorch's own took 126 us to enter an op of 17 arguments that does nothing, this one 36 us, and 18 and 14 us
    without a gradient (one busy CPU core, PyTorch 2.13): a good part of a small op's time on a CPU, and of a rollout's
    on a GPU. The op has no keyword-only arguments, no lists of tensors and no outputs that alias inputs.

    Args:
        op: What a message calls it.
        name: ``"wam::op"``; it and ``"wam::op_backward"``, which its backward calls, are defined already.
        setup_context: ``(ctx, inputs, output)``: saves what the backward needs.
        backward: ``(ctx, *grads)``: one gradient, or None, for each input.
        samples: For the arguments of ``name``.
        backward_samples: For the arguments of ``name + "_backward"``.
    """

    def second_order(ctx, *grads):
        raise NotImplementedError(
            f"{op}: has no second derivative (create_graph=True, hessian, grad of a grad); use impl='reference'"
        )

    _register_function(op, name, setup_context, backward)
    _register_function(op, f"{name}_backward", lambda ctx, inputs, output: None, second_order)
    _register_vmap(op, name, samples)
    _register_vmap(op, f"{name}_backward", backward_samples)


def register_inference(op: str, name: str, samples: Samples, outs: Collection[int] = ()) -> None:
    """For an op without derivatives: a call that asks for one is refused by name.

    Args:
        op: What a message calls it.
        name: ``"wam::op"``, defined already.
        samples: As for :func:`register`.
        outs: Positions of the arguments that are written to, None where one is left out.
    """
    overload = _overload(name)

    def autograd(*inputs):
        if torch.is_grad_enabled() and _any_requires_grad(*inputs) or _has_tangent(inputs):
            raise ValueError(
                f"{op}: is for inference and has no derivative, but an input requires a gradient or has a tangent; use "
                "torch.no_grad(), and impl='reference' for forward mode"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*inputs)

    torch.library.impl(name, "Autograd", autograd)
    _register_vmap(op, name, samples, outs)


def call(overload: Any, *inputs):
    """A registered op. Where nothing asks for a derivative it goes around autograd: 5 to 10 us of Python."""
    if torch.compiler.is_dynamo_compiling():  # which traces no more than the call
        return overload(*inputs)
    run = overload._op  # what a call of it calls, without a Python function around it
    if (
        torch.is_grad_enabled()
        and _any_requires_grad(*inputs)
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
    ):
        return run(*inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return run(*inputs)


def nothing_watches(*inputs: Tensor) -> bool:
    """Whether an eager call may go around the registered op: no gradient, transform or dispatch mode asks for it."""
    return not (
        torch.is_grad_enabled()
        and _any_requires_grad(*inputs)
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
    )


def _overload(name: str) -> Any:
    namespace, _, op_name = name.partition("::")
    return getattr(getattr(torch.ops, namespace), op_name).default


def _one_requires_grad(*inputs) -> bool:
    return any(isinstance(t, Tensor) and t.requires_grad for t in inputs)


# PyTorch's own is faster; 2.7 has none
_any_requires_grad = getattr(torch._C, "_any_requires_grad", _one_requires_grad)


def _has_tangent(inputs: tuple) -> bool:
    if forward_ad._current_level < 0:  # the usual case: nothing is in forward mode
        return False
    return any(isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in inputs)


def _register_function(op: str, name: str, setup_context: Callable, backward: Callable) -> None:
    # the kernels below record no graph, whatever they are: a device's, a fake tensor's, a tracer's
    run, below_autograd = _overload(name)._op, torch._C._AutoDispatchBelowAutograd

    def forward(ctx, *inputs):
        with below_autograd():
            output = run(*inputs)
        setup_context(ctx, inputs, output)
        return output

    def forward_of_level(ctx, modes, *inputs):
        # the levels of torch.func below this one differentiate too, but a Function turns that off
        with torch.set_grad_enabled(modes[0]), forward_ad._set_fwd_grad_enabled(modes[1]):
            return forward(ctx, *inputs)

    def jvp(ctx, *tangents):
        raise NotImplementedError(
            f"{op}: has no forward-mode derivative (jvp, jacfwd, hessian, dual tensors); use impl='reference', or "
            "reverse mode"
        )

    def function(forward: Callable, backward: Callable) -> Any:
        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward), "jvp": staticmethod(jvp)}
        # of one level of torch.func, like a kernel of PyTorch's own: the dispatcher goes from level to level
        return type(f"Autograd_{name.partition('::')[2]}", (torch.autograd.function._SingleLevelFunction,), methods)

    of_no_level = function(forward, backward)
    of_level = function(forward_of_level, lambda ctx, *grads: (None, *backward(ctx, *grads)))

    def autograd(*inputs):
        graded = torch.is_grad_enabled() and _any_requires_grad(*inputs)
        if not graded and forward_ad._current_level < 0:
            with below_autograd():
                return run(*inputs)
        if not torch._C._are_functorch_transforms_active():
            return of_no_level.apply(*inputs)
        with enable_single_level_autograd_function():
            return of_level.apply((torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled()), *inputs)

    torch.library.impl(name, "Autograd", autograd)


def _register_vmap(op: str, name: str, samples: Samples, outs: Collection[int] = ()) -> None:
    """What is mapped joins the batch, or where it cannot, is called for one after another."""
    overload = _overload(name)

    def rule(info, in_dims, *inputs):
        dims = {i: dim for i, dim in enumerate(in_dims) if isinstance(dim, int)}
        if any(inputs[i] is not None and i not in dims for i in outs):
            raise ValueError(f"{op}: out must be mapped like the inputs, got one that vmap does not map; map it too")
        n = info.batch_size
        if outs:
            for i in range(n):
                overload(*_changed(inputs, dims, lambda t, dim, i=i: t.select(dim, i)))
            return None, None
        if n == 0:
            # one call on zeros tells the shapes
            results = overload(*_changed(inputs, dims, _first_or_zeros))
            return tuple(t[None][:0] for t in results), 0
        of_batch = set(samples(inputs, dims))
        if dims.keys() <= of_batch:
            joined = {i: dims.get(i) for i in of_batch if inputs[i] is not None}
            results = overload(*_changed(inputs, joined, lambda t, dim: _join(t, dim, n)))
            return tuple(t.unflatten(0, (n, t.shape[0] // n)) for t in results), 0
        each = [overload(*_changed(inputs, dims, lambda t, dim, i=i: t.select(dim, i).contiguous())) for i in range(n)]
        return tuple(torch.stack(parts) for parts in zip(*each, strict=True)), 0

    torch.library.register_vmap(name, rule)


def _changed(inputs: tuple, dims: Mapping[int, int | None], change: Callable) -> list:
    return [change(t, dims[i]) if i in dims else t for i, t in enumerate(inputs)]


def _first_or_zeros(t: Tensor, dim: int) -> Tensor:
    t = t.movedim(dim, 0)
    return torch.cat((t, t.new_zeros((1, *t.shape[1:]))))[0]


def _join(t: Tensor, dim: int | None, n: int) -> Tensor:
    """``[n * B, *]``: the mapped dim, or n times the same where there is none, before the batch."""
    t = t.expand(n, *t.shape) if dim is None else t.movedim(dim, 0)
    return t.flatten(0, 1).contiguous()
