"""What comes before the first step: the base model, images as latents, the checkpoint to go on from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from .. import device, models, settings
from ..adapters import METHODS
from ..data import buckets, captions, latents
from ..data.captions import Texts
from ..data.crops import Cropping
from ..data.latents import EncodedImage, Stream
from ..errors import UserError
from ..models import Family
from ..models.family import check_sides
from ..terminal import escaped
from . import checkpoint, identity, material
from . import class_images as generating
from .checkpoint import State
from .encoding import Encoder
from .events import Encoded, Event, Progress, Remark, Resumed
from .examples import Streams, process_of
from .material import Material
from .optimizers import OPTIMIZERS
from .recipe import Recipe, check
from .step import Stepper
from .validation import Scorer, Scoring

DTYPES = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}


def on_this_machine(recipe: Recipe) -> Recipe:
    """The recipe with a precision that suits the device, where it names none."""
    if recipe.model.mixed_precision is not None:
        return recipe
    dtype = device.compute_dtype(device.choose(recipe.model.device), None)
    return settings.replaced(recipe, mixed_precision=next(name for name, one in DTYPES.items() if one == dtype))


def for_model(recipe: Recipe, family: Family, state: State | None = None) -> Recipe:
    """The recipe with the usual rate, where it names none, or with the rate that its run has found.

    Args:
        state: the checkpoint to go on from.

    Raises:
        UserError: it cannot be combined with other settings.
    """
    rate = recipe.optimization.learning_rate
    if rate is None:
        rate = usual_rate(recipe, family)
    elif rate == "auto" and state is not None:
        rate = state.recipe.get("learning_rate") or "auto"
    recipe = settings.replaced(recipe, learning_rate=rate)
    check(recipe)
    return recipe


def usual_rate(recipe: Recipe, family: Family) -> float:
    """Of the base model, the method and the optimizer."""
    optimizer = OPTIMIZERS[recipe.optimization.optimizer]
    if optimizer.finds_rate:
        return 1.0
    return optimizer.rate * METHODS[recipe.adapter.method].rate * family.learning_rate


def checkpoint_to_resume(recipe: Recipe) -> Generator[Event, None, State | None]:
    if not recipe.output.resume_from_checkpoint:
        return None
    state, remarks = checkpoint.find(recipe.output.output_dir, recipe.output.resume_from_checkpoint)
    for remark in remarks:
        yield Remark(remark)
    if remarks:
        yield Remark(f"going on from {escaped(state.path, 1000)} instead")
    if state.identity is None:
        yield Remark(
            f"{escaped(state.path, 1000)} is of an older version and does not know its images: go on only if they are "
            f"the same"
        )
    if state.step > recipe.optimization.max_train_steps:
        raise UserError(
            f"{escaped(state.path, 1000)} has done {state.step} steps already: --max_train_steps "
            f"{recipe.optimization.max_train_steps} is less"
        )
    return state


def load(recipe: Recipe, family: Family | None = None) -> Generator[Event, None, tuple[Accelerator, Family, int]]:
    """Processes, base model (unless it is there already), and the side of the images in pixels.

    Args:
        recipe: of `on_this_machine`.
    """
    where, precision = recipe.model.device, recipe.model.mixed_precision
    chosen = device.choose(where)
    if precision == "fp16" and torch.device(chosen).type == "cpu":
        raise UserError("--mixed_precision fp16 needs a GPU: take bf16 or no on the CPU")
    if recipe.optimization.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    accelerator = Accelerator(
        mixed_precision="fp16" if precision == "fp16" else "no",
        gradient_accumulation_steps=recipe.optimization.gradient_accumulation_steps,
        cpu=torch.device(chosen).type == "cpu",
        device_placement=False,  # the base model is where it was loaded to
    )
    if accelerator.num_processes > 1 and torch.device(chosen).index is None:
        chosen = str(accelerator.device)  # `cuda` alone would put all of them on the first GPU
    dtype = DTYPES[precision or "no"]
    slow = device.slow_bfloat16(chosen, dtype)
    if slow:
        yield Remark(slow)
    if family is None:
        base, vae = recipe.model.pretrained_model_name_or_path, recipe.model.pretrained_vae_model_name_or_path
        family = models.load(base, dtype, chosen, recipe.model.quantize, vae)
    side = recipe.data.resolution
    resolution, _ = check_sides(family, side, side, ("--resolution", "--resolution"))
    process_of(family, recipe)
    return accelerator, family, resolution


def cut_prompts(recipe: Recipe, family: Family, found: Material) -> Iterator[Remark]:
    """A remark for each prompt that the model cuts off."""
    prompts = [found.prompt, found.shown]
    if recipe.prior.with_prior_preservation:
        prompts.append(found.class_prompt)
    prompts += [*found.said.values(), *found.said_classes.values(), *found.said_held_out.values()]
    for prompt in dict.fromkeys(prompts):
        if count := family.prompt_overflow(prompt):
            source = escaped(family.source, 1000)
            yield Remark(f'the prompt "{escaped(prompt)}" is too long for {source} and is cut by {count} tokens')


def class_images(
    recipe: Recipe, accelerator: Accelerator, family: Family, found: Material, resolution: int
) -> Generator[Event, None, Material]:
    """The material with the images of the class, where they are wanted; those that are missing are generated."""
    if not recipe.prior.with_prior_preservation or not recipe.prior.num_class_images:
        return found
    if accelerator.is_main_process:
        yield from generating.prepare(recipe, family, found.class_prompt, resolution)
    accelerator.wait_for_everyone()
    report = generating.images(recipe)
    said = yield from material.captions_of(recipe.data, report, "class images")
    return found._replace(classes=report.images[: recipe.prior.num_class_images], said_classes=said)


def cropping_of(recipe: Recipe, family: Family, resolution: int) -> Cropping:
    """What the model sees of instance images."""
    fitting = buckets.for_model(resolution, family.multiple, family.largest) if recipe.data.enable_bucket else None
    return Cropping(resolution, resolution, random=recipe.data.random_crop, buckets=fitting)


def encoded(recipe: Recipe, family: Family, resolution: int, found: Material) -> Generator[Event, None, Streams]:
    """Instance images and class images as latents, with their prompts."""
    data, report, encoder = recipe.data, found.report, Encoder(family, recipe)
    cropping = cropping_of(recipe, family, resolution)
    images = yield from _as_latents(encoder, "instance images", found.instance, cropping, data.random_flip, found.masks)
    instance = Stream(images, report.repeats)
    if data.enable_bucket:
        yield _buckets(instance)
    classes = {}
    for size in dict.fromkeys(instance.sizes) if found.classes else ():
        cropped = Cropping(*size, random=data.random_crop)
        what = f"class images at {size[1]}x{size[0]}" if data.enable_bucket else "class images"
        images = yield from _as_latents(encoder, what, found.classes, cropped, data.random_flip, {})
        classes[size] = Stream(images, [1] * len(images))
    texts = [found.prompt, *([found.class_prompt] if recipe.prior.with_prior_preservation else [])]
    made = Streams(instance, texts, *_said(recipe, found), classes=classes)
    if not recipe.optimization.train_text_encoder:
        made = made._replace(encoded=encoder.encode_prompts(made.texts))
    yield from encoder.remarks()
    return made


def _said(recipe: Recipe, found: Material) -> tuple[Sequence[Texts | None], Texts | None]:
    """Captions of instance images and class images, and those of held-out images."""
    data, seed = recipe.data, recipe.optimization.seed
    own = classes = unseen = None
    if found.said or data.shuffle_caption or data.caption_dropout:
        own = captions.texts(
            [found.report.name_of(path) for path in found.instance],
            found.said,
            found.prompt,
            seed=seed,
            shuffle=data.shuffle_caption,
            keep_tokens=data.keep_tokens,
            dropout=data.caption_dropout,
        )
    if found.said_classes:
        names = [path.name for path in found.classes]
        classes = captions.texts(names, found.said_classes, found.class_prompt, seed=seed)
    if found.said_held_out:
        unseen = captions.texts([path.name for path in found.held_out], found.said_held_out, found.prompt, seed=seed)
    return (own, classes), unseen


def with_class(recipe: Recipe, family: Family, streams: Streams, class_prompt: str) -> Streams:
    """The streams with the class prompt as their second one, also where nothing is to be preserved."""
    if len(streams.prompts) > 1:
        return streams
    made = streams._replace(prompts=[*streams.prompts, class_prompt])
    if made.encoded is not None:
        made = made._replace(encoded=Encoder(family, recipe).encode_prompts(made.texts))
    return made


def held_out(
    recipe: Recipe, family: Family, resolution: int, found: Material
) -> Generator[Event, None, Sequence[EncodedImage] | None]:
    """Held-out images as latents; None: there are none."""
    if not found.held_out:
        return None
    encoder, cropping = Encoder(family, recipe), cropping_of(recipe, family, resolution)._replace(random=False)
    images = yield from _as_latents(encoder, "held-out images", found.held_out, cropping, False, found.masks)
    yield from encoder.remarks()
    return images


def scorer(recipe: Recipe, found: Material, scoring: Scoring | None) -> Generator[Event, None, Scorer | None]:
    """What scores previews; None where they are not scored."""
    if recipe.validation.validate != "scores":
        return None
    if scoring is None:
        raise ValueError("--validate scores: nothing was given that scores; see loop.run")
    if recipe.validation.validation_prompt is None:
        yield Remark(
            "--validate scores: previews show the instance prompt; agreement with the prompt says more where "
            "--validation_prompt puts the subject into a new place"
        )
    prompt = found.subject.without_identifier(found.shown)
    return scoring(found.references, prompt, recipe.model.pretrained_model_name_or_path)


def _buckets(stream: Stream) -> Remark:
    counts = Counter(stream.sizes)
    listed = ", ".join(f"{width}x{height} ({counts[height, width]})" for height, width in sorted(counts))
    return Remark(f"buckets, with how many images: {listed}; the images of a step are of one of them")


def _as_latents(
    encoder: Encoder, what: str, paths: Sequence[Path], cropping: Cropping, flip: bool, masks: Mapping[Path, Path]
) -> Generator[Event, None, Sequence[EncodedImage]]:
    found = []
    for number, path in enumerate(paths):
        yield Progress(f"encoding {what}", number, len(paths))
        found.append(latents.encode(encoder, path, cropping, flip, masks.get(path)))
    yield Progress(f"encoding {what}", len(paths), len(paths))
    yield Encoded(what, len(paths))
    return found


def restore(state: State | None, recipe: Recipe, who: dict[str, Any], stepper: Stepper) -> Iterator[Resumed]:
    """
    Raises:
        UserError: the checkpoint is of another run.
    """
    if state is None:
        return
    if state.identity is None:
        words = identity.difference_of_old(state.recipe, recipe)
    else:
        words = identity.difference(state.identity, who)
    if words:
        raise UserError(f"{escaped(state.path, 1000)} was made {words}: resume with the same")
    checkpoint.restore(state, stepper.adapter, stepper.raw_optimizer, stepper.average)
    if stepper.accelerator.scaler is not None and state.scaler:
        stepper.accelerator.scaler.load_state_dict(dict(state.scaler))
    yield Resumed(state.path, state.step)
