"""Batches for the tiny models: words, and what else a model cannot do without."""

import inspect

import torch

from models.tiny import FIRST_WORD, SEQ, VOCAB

NEEDS_AN_IMAGE = {
    "git",
    "idefics",
    "kosmos-2",
    "vision-encoder-decoder",
    "pp_formulanet",
}  # optional by their signature


def text(model) -> dict:
    """A batch of words with labels, one of them ignored; where the model takes none without, with an image or sound."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(FIRST_WORD, VOCAB - 8, (2, SEQ), generator=generator)
    labels = ids.clone()
    labels[0, 3] = -100
    config, takes = model.config, inspect.signature(model.forward).parameters
    books = getattr(config, "num_codebooks", None)
    if books and type(model).__name__.startswith("Musicgen"):  # rows of ids are the codebooks of one sequence
        return dict(input_ids=ids % 32, labels=(labels % 32).view(2 // books, books, SEQ).transpose(1, 2))
    if "codebook_vocab_size" in vars(config):  # each word with the codes of the sound at that time
        ids = torch.stack([ids, *books * [ids % 32]], -1)
    given = dict(input_ids=ids, labels=labels)
    required = _required(model.forward)
    if "pixel_values" in required or config.model_type in NEEDS_AN_IMAGE:
        given["pixel_values"] = _pixels(model, generator)
        given |= _places(config, ids, takes)
    if "flattened_patches" in takes:
        patches = torch.randn(2, 6, 2 + config.vision_config.patch_embed_hidden_size, generator=generator)
        patches[..., :2] = torch.arange(6).view(6, 1) % 3 + 1  # the row and column of each come first
        given["flattened_patches"] = patches
    if config.model_type == "voxtral_realtime":  # hears one piece of sound with each word
        frames = SEQ * config.audio_length_per_tok
        given["input_features"] = torch.randn(2, config.audio_config.num_mel_bins, frames, generator=generator)
    if "mm_token_type_ids" in takes:
        given["mm_token_type_ids"] = torch.zeros_like(ids)
    if "qformer_input_ids" in required:
        given["qformer_input_ids"] = ids
    if "bbox" in takes:
        given["bbox"] = torch.rand(2, SEQ, 4, generator=generator).sort(-1).values
    return {n: t for n, t in given.items() if n in takes}


def _required(function) -> set[str]:
    parameters = inspect.signature(function).parameters.items()
    return {n for n, p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}


def _pixels(model, generator) -> torch.Tensor:
    vision = getattr(model.config, "vision_config", None) or model.config.encoder
    frames = {"idefics": (1,), "instructblipvideo": (2,)}.get(model.config.model_type, ())
    return torch.randn(2, *frames, 3, *2 * [_first(vision.image_size)], generator=generator)


def _places(config, ids, takes) -> dict:
    """Where in the words the image is: written into them, or as a mask of its own."""
    if (token := getattr(config, "image_token_index", None) or getattr(config, "video_token_index", None)) is not None:
        ids[:, 1 : 1 + config.num_query_tokens * (2 if config.model_type == "instructblipvideo" else 1)] = token
    if "image_embeds_position_mask" in takes:
        mask = torch.zeros_like(ids)
        mask[:, 1 : 1 + config.latent_query_num] = 1
        return dict(image_embeds_position_mask=mask)
    if "image_attention_mask" in takes:
        return dict(image_attention_mask=torch.ones(*ids.shape, 1, dtype=torch.long))
    return {}


def pictures(model, video: bool = False) -> dict:
    """A batch of words around one image or video, with labels for the words."""
    generator = torch.Generator().manual_seed(5)
    config, takes = model.config, inspect.signature(model.forward).parameters
    token = config.video_token_id if video else getattr(config, "image_token_id", None)
    token = config.image_token_index if token is None else token
    named, count = _seen(model, video, takes, generator)
    ids = torch.randint(FIRST_WORD, VOCAB - 8, (1, SEQ + count), generator=generator)
    ids[0, 2 : 2 + count] = token
    if "cross_attention_mask" in takes:  # beside the words, not among them
        named["cross_attention_mask"] = torch.ones(1, SEQ, *named["aspect_ratio_mask"].shape[1:], dtype=torch.long)
    named |= {"input_ids": ids, "labels": ids.masked_fill(ids == token, -100)}
    kinds = (ids == token).long() * (2 if video else 1)
    return named | {n: kinds for n in ("mm_token_type_ids", "token_type_ids") if n in takes}


def _seen(model, video: bool, takes, generator) -> tuple[dict, int]:
    """An image or a video as the model takes it, and how many words it stands for."""
    vision, which = model.config.vision_config, "video" if video else "image"
    pixels, of_a_patch = "pixel_values_videos" if video else "pixel_values", 3 * _first(vision.patch_size) ** 2
    if f"{which}_grid_thw" in takes:  # patches of any number of images in a row, and where each one ends
        side = 2 * (vision.merge_size if hasattr(vision, "merge_size") else vision.spatial_merge_size)
        frames = vision.patch_temporal if hasattr(vision, "patch_temporal") else vision.temporal_patch_size
        grid = torch.tensor([[1, side, side]])
        patches = torch.randn(int(grid.prod()), _first(frames) * of_a_patch, generator=generator)
        return {pixels: patches, f"{which}_grid_thw": grid}, 4
    if f"{which}_position_ids" in takes:  # patches with their places
        frames, side = 2 if video else 1, 2 * vision.pooling_kernel_size
        places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).expand(frames, -1, -1)
        given = {pixels: torch.rand(frames, side**2, of_a_patch, generator=generator), f"{which}_position_ids": places}
        return given | ({"num_frames_per_video": torch.tensor([frames])} if video else {}), 4 * frames
    size = [3, *2 * [_first(vision.image_size)]]
    if "aspect_ratio_ids" in takes:  # tiles of an image
        tiles = torch.ones(1, 1, vision.max_num_tiles, dtype=torch.long)
        given = {pixels: torch.randn(*tiles.shape, *size, generator=generator), "aspect_ratio_mask": tiles}
        return given | {"aspect_ratio_ids": tiles[..., 0]}, 0
    images = (1, 1) if "pixel_attention_mask" in takes else (1,)
    given = {pixels: torch.randn(*images, *size, generator=generator)}
    if "image_sizes" in _required(model.get_image_features):
        given["image_sizes"] = torch.tensor([size[1:]])
    with torch.no_grad():
        features = model.get_image_features(**given)
    if not isinstance(features, (torch.Tensor, list, tuple)):
        features = features.last_hidden_state if features.pooler_output is None else features.pooler_output
    parts = [features] if isinstance(features, torch.Tensor) else features
    return given, sum(f.numel() // f.shape[-1] for f in parts)


def _first(size) -> int:
    return size[0] if isinstance(size, (list, tuple)) else size
