"""`dpo_loss` in a GRPO-style trainer: best and worst of each group, the reference asked only once.

Adapter and samples are those of Flow-Factory's DPOTrainer; rows lie winner, loser, winner, loser,
as in verl-omni. From one inner epoch to the next stay 2B errors of the reference and B seeds.
Run: call `optimize` where that trainer has its own (tests/examples has a stand-in that runs).
"""

import itertools
import operator

import torch

from syncdpo import ops


def best_and_worst(samples):
    """[winner, loser, winner, loser, …] of the groups whose advantages differ."""
    chosen = []
    by_group = operator.attrgetter("unique_id")
    for _, group in itertools.groupby(sorted(samples, key=by_group), by_group):
        ranked = sorted(group, key=lambda s: float(s.extra_kwargs["advantage"]))
        if ranked[0].extra_kwargs["advantage"] < ranked[-1].extra_kwargs["advantage"]:
            chosen += [ranked[-1], ranked[0]]
    if not chosen:
        raise ValueError("samples: expected a group whose advantages differ, got none")
    return chosen


def predict(adapter, clean, sigma, seed, given):
    """The velocity of x_t = (1 − σ)·x + σ·ε, rows in pairs that share σ and ε."""
    sigma, seed = (x.repeat_interleave(2) for x in (sigma, seed))
    level = sigma.reshape(-1, *[1] * (clean.ndim - 1))
    noisy = (1 - level) * clean + level * ops.noise(clean.shape, seed)
    t = 1000 * sigma  # the scheduler's scale
    return adapter.forward(t=t, latents=noisy.to(clean.dtype), **given).noise_pred


def optimize(adapter, samples, optimizer, conditions, *, beta, steps, inner_epochs):
    """The losses of all steps; `conditions(pairs)` is what else `forward` wants of the rows."""
    pairs = best_and_worst(samples)
    clean = torch.stack([sample.all_latents[-1] for sample in pairs])
    sigma = torch.rand(steps, len(pairs) // 2, device=clean.device)
    seed = torch.randint(2**62, sigma.shape, device=clean.device)
    losses, errors, given = [], [], conditions(pairs)
    with torch.no_grad(), adapter.use_ref_parameters():
        for level, own in zip(sigma, seed, strict=True):
            reference = predict(adapter, clean, level, own, given)
            target = ops.noise(clean.shape, own.repeat_interleave(2)) - clean
            errors.append((reference.float() - target).square().flatten(1).mean(1))
    for _, step in itertools.product(range(inner_epochs), range(steps)):
        policy = predict(adapter, clean, sigma[step], seed[step], given)
        target = ops.Velocity(clean, seed[step])
        loss = ops.dpo_loss(policy, None, target, beta=beta, reference_error=errors[step],
                            layout="interleaved")  # fmt: skip
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
