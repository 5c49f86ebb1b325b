"""star-edge inspect: attention as arrays and as a picture."""

from __future__ import annotations

from typing import Any

import click
import numpy as np

from ..errors import ConfigError
from ..io.overlay import draw_matrix
from .options import (
    FilePath,
    check_picture_path,
    complete_file,
    examples,
    load_engine,
    model_options,
    print_json,
    quiet_option,
    save_overlay,
    save_picture,
)
from .pruning import Pruning, prune_options_after_encoder


@click.command(
    epilog=examples(
        "star-edge inspect -m text.gguf --mmproj mmproj.gguf --image a.jpg -L 4 \\",
        '    --picture attention.png "Where is the cat?"',
        'star-edge inspect -m text.gguf -L 0 -L 5 "A plain text model works too"',
    )
)
@click.argument("prompt")
@click.option(
    "--image",
    "images",
    multiple=True,
    shell_complete=complete_file,
    help="Image file or URL; repeat for several. Without one: a plain text model.",
)
@model_options
@prune_options_after_encoder
@click.option(
    "-L",
    "--layer",
    "decoder_layers",
    type=int,
    multiple=True,
    help="Decoder layer, from 0; repeat for several. Default: layer K.",
)
@click.option(
    "-E",
    "--encoder-layer",
    "encoder_layers",
    type=int,
    multiple=True,
    help="Encoder layer, from 0; repeat for several.",
)
@click.option("--mean-heads", is_flag=True, help="Average over heads.")
@click.option("--raw", is_flag=True, help="The prompt is used as it is, without the model's chat template.")
@click.option(
    "-o",
    "--out",
    type=FilePath(dir_okay=False),
    default="attention.npz",
    show_default=True,
    help="The arrays are written to this file.",
)
@click.option(
    "--picture",
    type=FilePath(dir_okay=False),
    help="Draw the attention of the first decoder layer asked for: to the image, or token by token.",
)
@click.option("--overlay", type=FilePath(dir_okay=False), help="Draw the tokens that the prune options would keep.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON: files, and shapes of the arrays.")
@quiet_option
def inspect(
    prompt: str,
    images: tuple[str, ...],
    decoder_layers: tuple[int, ...],
    encoder_layers: tuple[int, ...],
    mean_heads: bool,
    raw: bool,
    out: str,
    picture: str | None,
    overlay: str | None,
    as_json: bool,
    quiet: bool,
    pruning: Pruning,
    **model: Any,
) -> None:
    """Write the attention of any layer, and the kept tokens, to an .npz file and a picture.

    Arrays: tokens, image_of_token, decoder_L (heads, query, key), encoder_image_I_layer_L, and for each image
    kept_vision_I and kept_decoder_I (indices of kept image tokens) with scores_vision_I and scores_decoder_I.
    """
    config = pruning.config()
    if not out.endswith(".npz"):
        raise ConfigError(f"{out} does not end in .npz", "arrays are written in NumPy's format")
    for path in filter(None, (picture, overlay)):
        check_picture_path(path)
    if overlay and (not images or config is None):
        raise ConfigError("--overlay needs an image and a preset that prunes", "add --image FILE")
    problems: list[str] = []
    with load_engine(**model) as vlm:
        more: dict[str, np.ndarray] = {}
        report = None
        if images:
            _, report = vlm.read_prompt(prompt, list(images), config, chat=not raw)
            for i, image in enumerate(report.images):
                more |= {f"kept_vision_{i}": image.vision_kept, f"kept_decoder_{i}": image.decoder_kept}
                for name, scores in (
                    (f"scores_vision_{i}", image.vision_scores),
                    (f"scores_decoder_{i}", image.decoder_scores),
                ):
                    if scores is not None:
                        more[name] = scores
        layers = list(decoder_layers) or (
            [report.decoder_layer] if report and report.decoder_layer is not None else [vlm.decoder.n_layers // 2]
        )
        result = vlm.inspect(
            prompt,
            list(images),
            decoder_layers=layers,
            encoder_layers=encoder_layers,
            mean_heads=mean_heads,
            chat=not raw,
        )
        try:
            result.save(out, **more)
        except OSError as error:
            raise ConfigError(f"{out} cannot be written ({error.strerror})", "use an existing folder") from error
        written = [out]
        if picture:
            save_picture(_draw(result, layers[0], images, vlm), picture)
            written.append(picture)
        if overlay:
            assert report is not None
            drawn, problems = save_overlay(report, list(images), overlay, vlm.image_limits)
            written += drawn
    for problem in problems:
        click.echo(f"no overlay of {problem}", err=True)
    arrays = {name: list(a.shape) for name, a in {**result.arrays(), **more}.items()}
    if as_json:
        print_json({"written": written, "n_tokens": len(result.tokens), "arrays": arrays})
    if as_json or quiet:
        return
    for name, shape in arrays.items():
        click.echo(f"{name}: {tuple(shape)}")
    click.echo(f"written: {', '.join(written)}")


def _draw(result: Any, layer: int, images: tuple[str, ...], vlm: Any) -> Any:
    if images:
        return result.picture(images[0], layer, limits=vlm.image_limits)
    attention = result.decoder[layer]
    mean = attention.mean(axis=0) if attention.ndim == 3 else attention
    title = f"decoder layer {layer}: from token (row) to token (column)"
    return draw_matrix(mean, title, header=f"Prompt, as the model reads it: {result.question}")
