"""`dpo_loss` in the DPO script of diffusers, examples/research_projects/diffusion_dpo.

What `preference_loss` returns replaces the script's lines from `model_losses = …` to
`implicit_acc += …`, all but those that make `ref_preds`, the reference's predictions. Pairs stay
as the script has them, winners in the first half of each batch.

Run: python examples/diffusers_dpo.py (one step of a small UNet with random weights and a LoRA)
"""

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig

from syncdpo import ops

# train_diffusion_dpo.py has no ½ inside its logistic, train_diffusion_dpo_sdxl.py has.
SD15, SDXL = 2.0, 1.0


def preference_loss(model_pred, ref_preds, target, beta_dpo, loss_type="sigmoid", factor=SD15):
    """(loss, what the script logs) for predictions and target [2B, …], the options as in there."""
    loss, stats = ops.dpo_loss(
        model_pred, ref_preds, target, beta=factor * beta_dpo, objective=loss_type,
        return_stats=True,
    )  # fmt: skip
    if loss_type == "ipo":  # ours is (β · logits − ½)², the script's (logits − 1 ∕ 2β)²
        loss = loss / beta_dpo**2
    return loss, {
        "raw_model_loss": torch.cat([stats.policy_win, stats.policy_lose]).mean(),
        "ref_loss": torch.cat([stats.reference_win, stats.reference_lose]).mean(),
        "implicit_acc": stats.implicit_accuracy,
    }


def training_step(unet, scheduler, latents, text, beta_dpo, **options):
    """The script's step from its latents [2B, …] and text [B, …] to `accelerator.backward`."""
    noise = torch.randn_like(latents).chunk(2)[0].repeat(2, 1, 1, 1)
    timesteps = torch.randint(1000, (len(latents) // 2,), device=latents.device).repeat(2)
    given = scheduler.add_noise(latents, noise, timesteps), timesteps, text.repeat(2, 1, 1)
    model_pred = unet(*given).sample
    unet.disable_adapters()
    with torch.no_grad():
        ref_preds = unet(*given).sample
    unet.enable_adapters()
    return preference_loss(model_pred, ref_preds, noise, beta_dpo, **options)


if __name__ == "__main__":
    blocks = {"block_out_channels": (32,), "down_block_types": ("CrossAttnDownBlock2D",)}
    blocks |= {"up_block_types": ("CrossAttnUpBlock2D",), "layers_per_block": 1}
    unet = UNet2DConditionModel(cross_attention_dim=16, attention_head_dim=8, **blocks)
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    latents, text = torch.randn(4, 4, 8, 8), torch.randn(2, 5, 16)
    loss, logs = training_step(unet, DDPMScheduler(), latents, text, beta_dpo=5000)
    loss.backward()
    print({"loss": loss.item()} | {name: value.item() for name, value in logs.items()})
