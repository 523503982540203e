"""`dpo_loss` in a plain PyTorch loop: a tiny policy learns that what flashes is also heard.

Losers are made of each batch as it comes, so the accuracy printed is that on pairs not seen before.
Run: python examples/plain_loop.py
"""

import copy

import torch

from syncdpo import ops
from syncdpo.negatives import Timeline, make_pairs, parse_rule

# Frames, and frames per second: two seconds of each stream.
TIMELINES = {"video_timeline": Timeline(12, 6.0), "audio_timeline": Timeline(24, 12.0)}
RULE = parse_rule("replace+shift")


class Denoiser(torch.nn.Sequential):
    """(video [B, 12, 1], audio [B, 24, 1], σ [B]) → the velocities of both."""

    def forward(self, video, audio, sigma):
        given = torch.cat([video[..., 0], audio[..., 0], sigma[:, None]], 1)
        return super().forward(given)[..., None].split([12, 24], 1)


def clips(batch):
    """One frame in four lights up; the sound of it decays over two of its own frames."""
    flash = 4 * (torch.rand(batch, 12, 1) < 0.25).float()
    return flash, torch.stack([flash, flash / 4], 2).flatten(1, 2)


def train(steps=120, batch=64, beta=(10.0, 10.0)):
    """The implicit accuracy of each step: how many pairs the policy tells apart as it should."""
    policy = Denoiser(torch.nn.Linear(37, 256), torch.nn.GELU(), torch.nn.Linear(256, 36))
    frozen = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-4)
    accuracy = []
    for step in range(steps):
        pairs = make_pairs(*clips(batch), RULE, step / steps, **TIMELINES)  # coarse, then subtle
        sigma, seed = torch.rand(batch), torch.randint(2**62, (batch,))
        noisy = ops.paired_noise(pairs.win, pairs.lose, sigma, seed)  # one ε for winner and loser
        clean = [torch.cat(both) for both in zip(pairs.win, pairs.lose, strict=True)]
        target = [ops.Velocity(x, seed, stream) for stream, x in enumerate(clean)]
        predictions = [model(*noisy, sigma.repeat(2)) for model in (policy, frozen)]
        loss, stats = ops.dpo_loss(
            *predictions, target, beta=beta, pair_weight=pairs.valid, return_stats=True
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        accuracy.append(stats.implicit_accuracy.item())
        if step % 20 == 0:
            print(f"step {step}: loss {loss:.3f}, implicit accuracy {accuracy[-1]:.2f}")
    return accuracy


if __name__ == "__main__":
    train()
