"""SyncDPO as a strategy of Lightricks' ltx-trainer: losers of each batch, reference = LoRA off.

Run: register it as the trainer's custom-training-strategies.md says, with `name: syncdpo`, and set
`trainer._training_strategy.model = trainer._transformer` before `trainer.train()`.
"""

from typing import Literal

import torch
from ltx_core.model.transformer.modality import Modality
from ltx_trainer.training_strategies import base_strategy as base

from syncdpo import ops
from syncdpo.negatives import Timeline, make_pairs, parse_rule


class SyncDPOConfig(base.TrainingStrategyConfigBase):
    name: Literal["syncdpo"] = "syncdpo"
    beta: float = 5.0  # relative to the reference's errors: one for both streams
    rules: str = "replace+scale"
    difficulty: float = 0.3

    def get_data_sources(self):
        return {name: name for name in ("latents", "audio_latents", "conditions")}


class SyncDPOStrategy(base.TrainingStrategy):
    model = None  # the transformer with its LoRA

    def prepare_training_inputs(self, batch, timestep_sampler):
        data, text, stride = batch["latents"], batch["conditions"], self.video_scale_factors.time
        size = frames, height, width = [int(data[k][0]) for k in ("num_frames", "height", "width")]
        fps = float(data["fps"][0]) if "fps" in data else base.DEFAULT_FPS
        x = self._video_patchifier.patchify(data["latents"])
        y = self._audio_patchifier.patchify(batch["audio_latents"]["latents"])
        seen = Timeline(frames, fps / stride, tokens=height * width, stride=stride)
        times = {"video_timeline": seen, "audio_timeline": Timeline(y.shape[1], 25.0, stride=4)}
        pairs = make_pairs(x, y, parse_rule(self.config.rules), self.config.difficulty, **times)
        both, seed = 2 * len(x), torch.randint(2**62, (len(x),), device=x.device)
        sigma = [timestep_sampler.sample_for(latents) for latents in pairs.win]
        places = (self._get_video_positions(*size, both, fps, x.device),
                  self._get_audio_positions(y.shape[1], both, x.device))  # fmt: skip
        streams, targets, attended = [], [], torch.cat([text["prompt_attention_mask"]] * 2)
        for m, noisy in enumerate(ops.paired_noise(pairs.win, pairs.lose, sigma, seed)):
            levels = sigma[m].repeat(2)[:, None].expand(noisy.shape[:2])
            words = torch.cat([text[("video_prompt_embeds", "audio_prompt_embeds")[m]]] * 2)
            streams += [Modality(noisy, levels[:, 0], levels, places[m], words, True, attended)]
            targets += [ops.Velocity(torch.cat([pairs.win[m], pairs.lose[m]]), seed, m)]
        return base.ModelInputs(*streams, *targets, pairs.valid, pairs.valid)

    def compute_loss(self, video_pred, audio_pred, inputs):
        if self.model is None:
            raise ValueError("model: expected the trainer's transformer, got None; set it first")
        with torch.no_grad(), getattr(self.model, "module", self.model).disable_adapter():
            reference = self.model(video=inputs.video, audio=inputs.audio, perturbations=None)
        options = {"beta": self.config.beta, "normalize": "reference", "reduction": "none"}
        options |= {"pair_weight": inputs.video_loss_mask}  # 0 where winner and loser are the same
        both = (video_pred, audio_pred), reference, (inputs.video_targets, inputs.audio_targets)
        return ops.dpo_loss(*both, **options).repeat(2)  # as the trainer books it, one per row
