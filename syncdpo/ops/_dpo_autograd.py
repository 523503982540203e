"""How `dpo_loss` runs and is differentiated: eager code by autograd, compiled code as an op."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import weight_of
from ._dpo_reference import Options, backward_reference, forward_reference


def weights(beta, sft_weight):
    """β per modality and the SFT weight, as floats."""
    return [weight_of("beta", b) for b in beta], weight_of("sft_weight", sft_weight)


def _kernels():
    """Imported when first asked for: a CPU needs no Triton."""
    from syncdpo.kernels import dpo_loss

    return dpo_loss


def run_forward(*arguments, compiled=False):
    """`arguments` as of the reference. Compiled code may be captured in graphs whose memory is
    theirs alone, so there the kernel keeps nothing from call to call."""
    if arguments[-1].impl == "kernel":
        return _kernels()._fwd(*arguments, keep_counters=not compiled)
    return forward_reference(*arguments)


def run_backward(grad, slope, policy, target, seed, mask, options):
    """The gradients; β and the SFT weight are in the slope already."""
    run = _kernels()._bwd if options.impl == "kernel" else backward_reference
    return run(grad, slope, policy, target, seed, mask, options)


def _second_derivative(ctx, *_):
    raise RuntimeError(
        "dpo_loss has no second derivative: its gradient cannot be differentiated again "
        "(gradient penalties and Hessians need the loss in plain PyTorch)"
    )


class _Gradient(torch.autograd.Function):
    """Gradients as they are, tied to what they depend on, so that differentiating them raises.

    `once_differentiable` looks at the loss's own gradient alone, which is mostly a constant: the
    second derivative came out as zero, without a word.
    """

    @staticmethod
    def forward(ctx, count, *gradients_and_origins):
        return gradients_and_origins[:count]

    backward = staticmethod(_second_derivative)


class _DPOLoss(torch.autograd.Function):
    """The quick way in eager: half the overhead of a registered op."""

    @staticmethod
    def forward(ctx, rest, options, *policy):
        reference, target, seed, mask, reference_error, pair_weight = rest
        loss, *stats, slope = run_forward(
            policy, reference, target, seed, mask, reference_error, pair_weight, options
        )
        ctx.save_for_backward(slope, *policy, *target, *seed, *mask)
        ctx.options = options
        ctx.mark_non_differentiable(*stats)
        ctx.set_materialize_grads(False)
        return loss, *stats

    @staticmethod
    def backward(ctx, grad, *_):
        slope, *saved = ctx.saved_tensors
        count = len(slope)
        if grad is None:
            return None, None, *[None] * count
        policy, target, seed, mask = (saved[k * count : (k + 1) * count] for k in range(4))
        arguments = (grad, slope, policy, target, seed, mask, ctx.options)
        if not torch.is_grad_enabled():
            return None, None, *run_backward(*arguments)
        with torch.no_grad():  # create_graph=True
            grads = run_backward(*arguments)
        return None, None, *_Gradient.apply(count, *grads, grad, *policy)


# β and the SFT weight are tensors on the CPU, so that a schedule does not compile anew for every
# value. The op reads them on the host: CUDA graphs must leave it out, or they replay the first.
_SCALES_SCHEMA = "Tensor beta, Tensor sft_weight"
_OPTIONS_SCHEMA = (
    "int[] stream, int[] sign, str objective, bool separate, bool normalize, "
    "float label_smoothing, bool interleaved, bool mean, bool stats, str impl"
)
_TAGS = [torch.Tag.cudagraph_unsafe] if hasattr(torch.Tag, "cudagraph_unsafe") else []


def _on_host(numbers):
    """Floats as a float64 tensor on the CPU.

    As products: the compiler keeps a float that changes symbolic there, while `torch.tensor` would
    make a constant of it and compile anew.
    """
    one = torch.ones((), dtype=torch.float64, device="cpu")
    plain = [x.detach().reshape(()) if isinstance(x, Tensor) else x for x in numbers]
    return torch.stack([one * x for x in plain])


@torch.library.custom_op(
    "syncdpo::dpo_loss",
    mutates_args=(),
    schema="(Tensor[] policy, Tensor[] reference, Tensor[] target, Tensor?[] seed, Tensor?[] mask, "
    f"Tensor? reference_error, Tensor? pair_weight, {_SCALES_SCHEMA}, {_OPTIONS_SCHEMA}) "
    "-> (Tensor loss, Tensor margin, Tensor weight, Tensor errors, Tensor slope)",
    tags=_TAGS,
)
def _dpo_loss_op(
    policy, reference, target, seed, mask, reference_error, pair_weight, beta, sft_weight, *rest
):
    options = Options(*weights(beta.tolist(), sft_weight.item()), *rest)
    return run_forward(
        policy, reference, target, seed, mask, reference_error, pair_weight, options,
        compiled=True,
    )  # fmt: skip


@_dpo_loss_op.register_fake
def _(policy, reference, target, seed, mask, reference_error, pair_weight, beta, sft_weight, *rest):
    options = Options(beta, sft_weight, *rest)
    modalities, rows = len(policy), policy[0].shape[0]
    shapes = {
        "loss": () if options.mean else (rows // 2,),
        "margin": (modalities, rows // 2),
        "weight": (rows // 2,),
        "errors": (2 if options.stats else 0, modalities, rows),
        "slope": (modalities, rows),
    }
    dtype = torch.promote_types(policy[0].dtype, torch.float32)
    return tuple(policy[0].new_empty(shape, dtype=dtype) for shape in shapes.values())


@torch.library.custom_op(
    "syncdpo::dpo_loss_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor slope, Tensor[] policy, Tensor[] target, Tensor?[] seed, "
    f"Tensor?[] mask, {_OPTIONS_SCHEMA}) -> Tensor[]",
)
def _dpo_loss_backward_op(grad, slope, policy, target, seed, mask, *rest):
    return run_backward(grad, slope, policy, target, seed, mask, Options([], 0.0, *rest))


@_dpo_loss_backward_op.register_fake
def _(grad, slope, policy, target, seed, mask, *rest):
    return [torch.empty_like(p) for p in policy]


_dpo_loss_backward_op.register_autograd(_second_derivative)


def _no_gradient(value):
    """None in the structure that torch.library wants: one for each entry of a list of tensors."""
    listed = isinstance(value, list) and all(isinstance(entry, Tensor) for entry in value)
    return [None] * len(value) if listed else None


def _setup_context(ctx, inputs, output):
    policy, _, target, seed, mask, _, _, _, _, *ctx.options = inputs
    ctx.constants = [_no_gradient(value) for value in inputs[1:]]
    ctx.save_for_backward(output[-1], *policy, *target, *seed, *mask)
    ctx.set_materialize_grads(False)


def _registered_backward(ctx, grad, *_):
    slope, *saved = ctx.saved_tensors
    count = len(slope)
    policy, target, seed, mask = (saved[k * count : (k + 1) * count] for k in range(4))
    grads = [None] * count
    if grad is not None:
        grads = torch.ops.syncdpo.dpo_loss_backward(
            grad, slope, policy, target, seed, mask, *ctx.options
        )
    return grads, *ctx.constants


_dpo_loss_op.register_autograd(_registered_backward, setup_context=_setup_context)


def differentiable(policy, rest, options):
    """loss, margin, weight and errors; `rest`: what `forward_reference` takes, from `reference` to
    `pair_weight`."""
    if not torch.compiler.is_compiling():
        return _DPOLoss.apply(rest, options, *policy)
    scales = _on_host(options.beta), _on_host([options.sft_weight])
    loss, *stats, _ = torch.ops.syncdpo.dpo_loss(policy, *rest, *scales, *options[2:])
    return loss, *stats
