"""examples/grpo_trainer_interleaved.py against the loss of Flow-Factory and verl-omni."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from from_examples import load
from torch.nn.functional import logsigmoid

TOKENS, CHANNELS = 9, 4  # video and audio tokens in one row, as Flow-Factory lays them


class Adapter(torch.nn.Module):
    """The call signatures of Flow-Factory's; takes note of what it is asked."""

    def __init__(self):
        super().__init__()
        self.policy, self.frozen = (torch.nn.Linear(CHANNELS, CHANNELS) for _ in range(2))
        self.frozen.requires_grad_(False)
        self.model, self.seen = self.policy, []

    def forward(self, t, latents, prompt_embeds):
        noise_pred = self.model(latents) + (t[:, None, None] / 1000 + prompt_embeds[:, None, None])
        kind = "policy" if self.model is self.policy else "reference"
        self.seen.append((kind, t, latents, noise_pred.detach()))
        return SimpleNamespace(noise_pred=noise_pred)

    @contextlib.contextmanager
    def use_ref_parameters(self):
        self.model = self.frozen
        yield
        self.model = self.policy


def sample(group, advantage):
    latents = torch.randn(3, TOKENS, CHANNELS)  # of each step of the sampler, the last one clean
    extra = {"advantage": torch.tensor(advantage)}
    return SimpleNamespace(unique_id=group, all_latents=latents, extra_kwargs=extra)


def rollouts():
    torch.manual_seed(0)
    advantages = [(7, 0.2), (5, -1.0), (7, -0.3), (5, 1.5), (7, 0.9), (5, 0.1), (9, 0.4), (9, 0.4)]
    return [sample(*row) for row in advantages]


def conditions(pairs):
    return {"prompt_embeds": torch.tensor([0.1 * pair.unique_id for pair in pairs])}


def in_turn(policy, reference, target, beta):
    own, other = ((x - target).square().mean((1, 2)) for x in (policy, reference))
    gap = (own[0::2] - own[1::2]) - (other[0::2] - other[1::2])
    return -logsigmoid(-0.5 * beta * gap).mean()


def test_pairs_are_the_best_and_the_worst_of_each_group_in_turn():
    samples = rollouts()
    pairs = load("grpo_trainer_interleaved").best_and_worst(samples)
    expected = [samples[k] for k in (3, 1, 4, 2)]  # of group 9 none is better
    assert [id(pair) for pair in pairs] == [id(pair) for pair in expected]


def test_without_a_group_to_choose_from_it_says_so():
    with pytest.raises(ValueError, match="samples: expected a group whose advantages differ"):
        load("grpo_trainer_interleaved").best_and_worst(rollouts()[-2:])


def test_losses_and_steps_are_the_trainer_s_and_the_reference_is_asked_once():
    samples, adapter, beta, rate = rollouts(), Adapter(), 50.0, 1e-3
    optimizer = torch.optim.SGD(adapter.policy.parameters(), lr=rate)
    clean = torch.stack([samples[k].all_latents[-1] for k in (3, 1, 4, 2)]).double()
    before = {name: x.detach().double() for name, x in adapter.policy.named_parameters()}
    example = load("grpo_trainer_interleaved")
    losses = example.optimize(
        adapter, samples, optimizer, conditions, beta=beta, steps=2, inner_epochs=2
    )
    kinds = [kind for kind, *_ in adapter.seen]
    assert kinds == ["reference"] * 2 + ["policy"] * 4
    for k, loss in enumerate(losses):
        (_, t, noisy, reference), (_, again, same, policy) = (
            adapter.seen[k % 2],
            adapter.seen[2 + k],
        )
        assert torch.equal(t, again)
        assert torch.equal(noisy, same)
        sigma = t.double()[:, None, None] / 1000
        epsilon = (noisy.double() - (1 - sigma) * clean) / sigma
        for shared in (t, epsilon):
            torch.testing.assert_close(shared[0::2], shared[1::2], rtol=0, atol=1e-4)
        expected = in_turn(policy.double(), reference.double(), epsilon - clean, beta)
        assert loss == pytest.approx(expected.item(), rel=1e-4)
        # The step that followed, from the weights that it began with.
        leaves = {name: x.clone().requires_grad_() for name, x in before.items()}
        prediction = torch.nn.functional.linear(noisy.double(), *leaves.values())
        prompts = conditions([samples[i] for i in (3, 1, 4, 2)])["prompt_embeds"]
        prediction = prediction + (sigma + prompts.double()[:, None, None])
        torch.testing.assert_close(prediction.detach(), policy.double(), rtol=0, atol=1e-4)
        plain = in_turn(prediction, reference.double(), epsilon - clean, beta)
        gradients = torch.autograd.grad(plain, list(leaves.values()))
        before = {n: x - rate * g for (n, x), g in zip(before.items(), gradients, strict=True)}
    for name, weight in adapter.policy.named_parameters():
        torch.testing.assert_close(weight.double(), before[name], rtol=0, atol=1e-5)
