"""The usual script: load every model whole, merge tensor by tensor in float32, save.

Run as `python plain.py JOB.json`.
"""

import time

import torch
from described import DescribedJob, described_job
from safetensors.torch import load_file, save_file
from torch import Tensor

UNET = "model.diffusion_model."

PARALLEL = 0.9995
"""Vectors whose cosine is larger are interpolated along the straight line."""


def main() -> None:
    """Merge with everything in memory."""
    job = described_job()
    started = time.perf_counter()
    models = {role: load(files) for role, files in job.models.items()}
    if job.method == "bake":
        merged = baked(models, job)
    else:
        merged = {name: merged_tensor(job, models, name) for name in models[job.layout]}
    save_file(merged, job.output, metadata={"format": "pt"})
    job.tell_time(started)


def baked(models: dict[str, dict[str, Tensor]], job: DescribedJob) -> dict[str, Tensor]:
    """W + w · B A: the model with a LoRA in kohya's names in it."""
    model, lora = (models[role] for role in job.merged)
    for name, tensor in model.items():
        module = f"lora_unet_{name.removeprefix(UNET).removesuffix('.weight').replace('.', '_')}"
        if f"{module}.lora_up.weight" in lora and name.startswith(UNET):
            up, down = (lora[f"{module}.lora_{part}.weight"].float() for part in ("up", "down"))
            model[name] = (tensor.float() + job.weights[1] * (up @ down)).to(tensor.dtype)
    return model


def load(files: list[str]) -> dict[str, Tensor]:
    """All tensors of a model, which may be in several files."""
    return {name: values for file in files for name, values in load_file(file).items()}


def merged_tensor(job: DescribedJob, models: dict[str, dict[str, Tensor]], name: str) -> Tensor:
    """One tensor of the output."""
    like = models[job.layout][name]
    if source := job.taken_from(name):
        return models[source][name]
    if not like.is_floating_point():
        return like
    inputs = [models[role][name] for role in job.merged]
    if job.method == "slerp":
        return slerp(*(values.float() for values in inputs), job.t).to(like.dtype)
    if job.method == "task_arithmetic":
        return task_arithmetic(models[job.base][name], inputs, job.weights).to(like.dtype)
    return weighted_mean(inputs, job.weights).to(like.dtype)


def weighted_mean(inputs: list[Tensor], weights: list[float]) -> Tensor:
    """Σ wᵢ θᵢ / Σ wᵢ."""
    total = inputs[0].float() * (weights[0] / sum(weights))
    for values, weight in zip(inputs[1:], weights[1:], strict=True):
        total.add_(values.float(), alpha=weight / sum(weights))
    return total


def task_arithmetic(base: Tensor, inputs: list[Tensor], weights: list[float]) -> Tensor:
    """θ₀ + Σ wᵢ (θᵢ − θ₀)."""
    start = base.float()
    return start + sum(weight * (values.float() - start) for values, weight in zip(inputs, weights, strict=True))


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """(sin((1−t)Ω) a + sin(tΩ) b) / sin Ω, where Ω is the angle between the flattened tensors."""
    norms = a.norm() * b.norm()
    cosine = ((a * b).sum() / norms).clamp(-1, 1) if norms > 0 else torch.tensor(1.0)
    if cosine.abs() > PARALLEL:
        return torch.lerp(a, b, t)
    angle = torch.acos(cosine)
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


if __name__ == "__main__":
    main()
