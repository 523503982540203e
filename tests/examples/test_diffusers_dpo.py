"""examples/diffusers_dpo.py against the formulas of diffusers' two scripts, in float64."""

import pytest
import torch
from from_examples import load, run
from torch.nn.functional import logsigmoid

from syncdpo.testing import predictions

pytest.importorskip("diffusers")
pytest.importorskip("peft")


def logits_of(policy, reference, target):
    def errors(prediction):
        return (prediction - target).square().mean(dim=[1, 2, 3]).chunk(2)

    (own_win, own_lose), (other_win, other_lose) = errors(policy), errors(reference)
    return (other_win - other_lose) - (own_win - own_lose)


SCRIPTS = {
    "sd15 sigmoid": ({}, lambda z, beta: -logsigmoid(beta * z)),
    "sd15 hinge": ({"loss_type": "hinge"}, lambda z, beta: torch.relu(1 - beta * z)),
    "sd15 ipo": ({"loss_type": "ipo"}, lambda z, beta: (z - 1 / (2 * beta)) ** 2),
    "sdxl": ({"factor": 1.0}, lambda z, beta: -logsigmoid(0.5 * beta * z)),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_loss_gradient_and_logs_are_the_script_s(script):
    options, formula = SCRIPTS[script]
    beta = 40.0
    (policy,), (reference,), (target,) = predictions((6, 4, 8, 3), gap=0.05)
    policy.requires_grad_()
    loss, logs = load("diffusers_dpo").preference_loss(policy, reference, target, beta, **options)
    exact = policy.detach().double().requires_grad_()
    z = logits_of(exact, reference.double(), target.double())
    expected = formula(z, beta).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(loss, policy)
    (true,) = torch.autograd.grad(expected, exact)
    torch.testing.assert_close(gradient.double(), true, rtol=1e-4, atol=1e-6 * true.abs().max())
    raw = [(x.double() - target.double()).square().mean() for x in (policy, reference)]
    torch.testing.assert_close(logs["raw_model_loss"].double(), raw[0].detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(logs["ref_loss"].double(), raw[1], rtol=1e-5, atol=0)
    assert logs["implicit_acc"] == (z > 0).float().mean()


class TinyUNet(torch.nn.Module):
    """What the script asks of a UNet: a call that returns `.sample`, and adapters to switch."""

    def __init__(self):
        super().__init__()
        self.adapter, self.on, self.seen = torch.nn.Parameter(torch.tensor(0.1)), True, []

    def forward(self, latents, timesteps, text):
        self.seen.append((latents, timesteps, text, self.on))
        scale = 0.9 + self.adapter if self.on else 0.9
        return type("Output", (), {"sample": scale * latents + text.mean()})

    def disable_adapters(self):
        self.on = False

    def enable_adapters(self):
        self.on = True


def test_a_step_asks_policy_and_reference_for_the_same_pairs():
    from diffusers import DDPMScheduler

    torch.manual_seed(0)
    unet, scheduler = TinyUNet(), DDPMScheduler()
    latents, text = torch.randn(4, 4, 8, 8), torch.randn(2, 5, 16)
    loss, _ = load("diffusers_dpo").training_step(unet, scheduler, latents, text, beta_dpo=30.0)
    (noisy, timesteps, given, on), (again, *_, off) = unet.seen
    assert (on, off, unet.on) == (True, False, True)
    assert noisy is again
    assert torch.equal(timesteps[:2], timesteps[2:])
    assert torch.equal(given, torch.cat([text, text]))
    level = scheduler.alphas_cumprod[timesteps].sqrt().reshape(-1, 1, 1, 1)
    noise = (noisy - level * latents) / (1 - level**2).sqrt()
    torch.testing.assert_close(noise[:2], noise[2:], rtol=0, atol=1e-4)  # one ε for both
    z = logits_of(1.0 * noisy + text.mean(), 0.9 * noisy + text.mean(), noise)
    torch.testing.assert_close(loss, -logsigmoid(30.0 * z).mean(), rtol=1e-3, atol=1e-5)
    loss.backward()
    assert unet.adapter.grad != 0


def test_it_runs_on_diffusers_own_unet(monkeypatch, capsys):
    run(monkeypatch, "diffusers_dpo")
    assert "implicit_acc" in capsys.readouterr().out
