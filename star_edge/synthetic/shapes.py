"""Sizes of decoders and vision encoders, and of models that people run.

The numbers in `SHAPES` are from the models' published configurations.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DeltaNetShape:
    """Sizes of the gated delta nets of a Qwen3.5 decoder.

    Attributes:
        n_heads_k: Heads of queries and keys.
        n_heads_v: Heads of values, a multiple of n_heads_k.
        d_head: Size of every head.
        kernel: Rows that the convolution before them sees.
    """

    n_heads_k: int
    n_heads_v: int
    d_head: int
    kernel: int = 4


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a text decoder. Others than these are explained by their names.

    Attributes:
        rope_sections: (t, y, x, unused), which sum to head size / 2: makes it a Qwen2-VL or Qwen2.5-VL decoder.
        n_deepstack: Layers to whose output states of earlier encoder layers are added: makes it a Qwen3-VL decoder.
        sliding_window: Tokens that all layers but every sixth see: makes it a Gemma 3 decoder.
        head_size: 0: n_embd / n_heads.
        tied: The output matrix is that of the token embeddings.
        rope_size: Values of a head that RoPE turns. 0: all.
        attention_layers: Layers with attention. Empty: all. The others are what delta_net or kernel says.
        delta_net: Makes it a Qwen3.5 decoder, whose other layers are gated delta nets.
        kernel: Makes it an LFM2 decoder, whose other layers are convolutions over so many rows.
    """

    n_layers: int
    n_embd: int
    n_heads: int
    n_heads_kv: int
    n_ff: int
    n_vocab: int = 512
    n_ctx: int = 4096
    rope_sections: tuple[int, int, int, int] | None = None
    rope_base: float = 10000.0
    sliding_window: int = 0
    head_size: int = 0
    tied: bool = False
    rope_size: int = 0
    attention_layers: tuple[int, ...] = ()
    delta_net: DeltaNetShape | None = None
    kernel: int = 0
    n_deepstack: int = 0

    @property
    def arch(self) -> str:
        if self.attention_layers:
            return "qwen35" if self.delta_net else "lfm2"
        if self.n_deepstack:
            return "qwen3vl"
        return "qwen2vl" if self.rope_sections else "gemma3" if self.sliding_window else "llama"

    @property
    def d_head(self) -> int:
        return self.head_size or self.n_embd // self.n_heads


@dataclass(frozen=True)
class EncoderShape:
    """Sizes of a vision encoder and its projector. Others than these are explained by their names.

    Attributes:
        kind: "clip" (LLaVA), "qwen2vl", "qwen2.5vl", "qwen3vl", "qwen3.5" (the same without DeepStack), "idefics3"
            (SmolVLM) or "gemma3".
        n_layers: Layers in the file. Stock llama.cpp runs one fewer for CLIP.
        n_merge: Side, in patches, of the square that becomes a token (idefics3, gemma3; Qwen has 2, CLIP 1).
        longest_edge: Pixels of the longer side that idefics3 scales a picture to before it cuts tiles of image_size.
        full_attention_every: qwen2.5vl: one layer in so many sees the whole image, the others windows of 112 pixels.
        pinpoints: (width, height) of the resolutions that LLaVA-NeXT cuts into crops of image_size.
        deepstack: qwen3vl: layers whose states the projector's output also has.
    """

    image_size: int
    patch_size: int
    n_layers: int
    n_embd: int
    n_heads: int
    n_ff: int
    kind: str = "clip"
    n_merge: int = 1
    longest_edge: int = 0
    full_attention_every: int = 8
    pinpoints: tuple[tuple[int, int], ...] = ()
    deepstack: tuple[int, ...] = ()


@dataclass(frozen=True)
class ModelShape:
    """A vision-language model, and the request that it is measured with.

    Attributes:
        decoder: Sizes of the decoder.
        encoder: Sizes of the encoder.
        dtype: Type of the decoder's file, as for write_decoder. Encoders are f16.
        picture: (width, height) in pixels.
        n_image_tokens: Image tokens that llama.cpp makes of the picture.
        about: One line on what the shape stands for.
    """

    decoder: DecoderShape
    encoder: EncoderShape
    dtype: str
    picture: tuple[int, int]
    n_image_tokens: int
    about: str


TINYLLAMA_1B = DecoderShape(n_layers=22, n_embd=2048, n_heads=32, n_heads_kv=4, n_ff=5632, n_vocab=32000)
VICUNA_7B = DecoderShape(n_layers=32, n_embd=4096, n_heads=32, n_heads_kv=32, n_ff=11008, n_vocab=32064)
SMOLLM2_360M = DecoderShape(
    n_layers=32,
    n_embd=960,
    n_heads=15,
    n_heads_kv=5,
    n_ff=2560,
    n_vocab=49280,
    n_ctx=8192,
    rope_base=100000.0,
    tied=True,
)
QWEN2_1B5 = DecoderShape(
    n_layers=28,
    n_embd=1536,
    n_heads=12,
    n_heads_kv=2,
    n_ff=8960,
    n_vocab=151936,
    n_ctx=32768,
    rope_sections=(16, 24, 24, 0),
    rope_base=1e6,
    tied=True,
)
QWEN25_3B = DecoderShape(
    n_layers=36,
    n_embd=2048,
    n_heads=16,
    n_heads_kv=2,
    n_ff=11008,
    n_vocab=151936,
    n_ctx=32768,
    rope_sections=(16, 24, 24, 0),
    rope_base=1e6,
    tied=True,
)
QWEN3_4B = DecoderShape(
    n_layers=36,
    n_embd=2560,
    n_heads=32,
    n_heads_kv=8,
    n_ff=9728,
    n_vocab=151936,
    n_ctx=32768,
    rope_sections=(24, 20, 20, 0),
    rope_base=5e6,
    head_size=128,
    tied=True,
    n_deepstack=3,
)
QWEN35_4B = DecoderShape(
    n_layers=32,
    n_embd=2560,
    n_heads=16,
    n_heads_kv=4,
    n_ff=9216,
    n_vocab=248320,
    n_ctx=32768,
    rope_sections=(11, 11, 10, 0),
    rope_base=1e7,
    head_size=256,
    tied=True,
    rope_size=64,
    attention_layers=tuple(range(3, 32, 4)),
    delta_net=DeltaNetShape(n_heads_k=16, n_heads_v=32, d_head=128),
)
QWEN35_08B = DecoderShape(
    n_layers=24,
    n_embd=1024,
    n_heads=8,
    n_heads_kv=2,
    n_ff=3584,
    n_vocab=248320,
    n_ctx=32768,
    rope_sections=(11, 11, 10, 0),
    rope_base=1e7,
    head_size=256,
    tied=True,
    rope_size=64,
    attention_layers=(3, 7, 11, 15, 19, 23),
    delta_net=DeltaNetShape(n_heads_k=16, n_heads_v=16, d_head=128),
)
GEMMA3_4B = DecoderShape(
    n_layers=34,
    n_embd=2560,
    n_heads=8,
    n_heads_kv=4,
    n_ff=10240,
    n_vocab=262208,
    n_ctx=32768,
    rope_base=1e6,
    sliding_window=1024,
    head_size=256,
    tied=True,
)

CLIP_L_336 = EncoderShape(image_size=336, patch_size=14, n_layers=24, n_embd=1024, n_heads=16, n_ff=4096)
CLIP_L_336_NEXT = EncoderShape(
    image_size=336,
    patch_size=14,
    n_layers=24,
    n_embd=1024,
    n_heads=16,
    n_ff=4096,
    pinpoints=((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)),
)
SIGLIP_B_512 = EncoderShape(
    image_size=512,
    patch_size=16,
    n_layers=12,
    n_embd=768,
    n_heads=12,
    n_ff=3072,
    kind="idefics3",
    n_merge=4,
    longest_edge=2048,
)
QWEN2_VISION = EncoderShape(
    image_size=560, patch_size=14, n_layers=32, n_embd=1280, n_heads=16, n_ff=5120, kind="qwen2vl"
)
QWEN25_VISION = EncoderShape(
    image_size=560, patch_size=14, n_layers=32, n_embd=1280, n_heads=16, n_ff=3420, kind="qwen2.5vl"
)
QWEN3_VISION = EncoderShape(
    image_size=768,
    patch_size=16,
    n_layers=24,
    n_embd=1024,
    n_heads=16,
    n_ff=4096,
    kind="qwen3vl",
    deepstack=(5, 11, 17),
)
QWEN35_VISION_L = EncoderShape(
    image_size=768, patch_size=16, n_layers=24, n_embd=1024, n_heads=16, n_ff=4096, kind="qwen3.5"
)
QWEN35_VISION = EncoderShape(
    image_size=768, patch_size=16, n_layers=12, n_embd=768, n_heads=12, n_ff=3072, kind="qwen3.5"
)
SIGLIP_SO400M_896 = EncoderShape(
    image_size=896, patch_size=14, n_layers=27, n_embd=1152, n_heads=16, n_ff=4304, kind="gemma3", n_merge=4
)

SHAPES = {
    "llava-1.1b": ModelShape(
        TINYLLAMA_1B, CLIP_L_336, "q4_k_m", (336, 336), 576, "TinyLlama-1.1B as a LLaVA-1.5, one picture of 576 tokens"
    ),
    "llava-1.5-7b": ModelShape(
        VICUNA_7B, CLIP_L_336, "q4_k_m", (336, 336), 576, "LLaVA-1.5-7B, one picture of 576 tokens"
    ),
    "llava-next-7b": ModelShape(
        VICUNA_7B,
        CLIP_L_336_NEXT,
        "q4_k_m",
        (672, 672),
        2880,
        "LLaVA-NeXT-7B, an overview and four crops of 576 tokens",
    ),
    "smolvlm-500m": ModelShape(
        SMOLLM2_360M, SIGLIP_B_512, "q8_0", (1024, 1024), 1088, "SmolVLM-500M, an overview and 16 tiles of 64 tokens"
    ),
    "qwen2-vl-2b": ModelShape(
        QWEN2_1B5, QWEN2_VISION, "q4_k_m", (560, 560), 400, "Qwen2-VL-2B, 1,600 patches, 400 tokens"
    ),
    "qwen2.5-vl-3b": ModelShape(
        QWEN25_3B, QWEN25_VISION, "q4_k_m", (896, 896), 1024, "Qwen2.5-VL-3B, 4,096 patches, 1,024 tokens"
    ),
    "qwen3-vl-4b": ModelShape(
        QWEN3_4B, QWEN3_VISION, "q4_k_m", (1024, 1024), 1024, "Qwen3-VL-4B, 4,096 patches, 1,024 tokens"
    ),
    "qwen3.5-4b": ModelShape(
        QWEN35_4B, QWEN35_VISION_L, "q4_k_m", (1024, 1024), 1024, "Qwen3.5-4B, 4,096 patches, 1,024 tokens"
    ),
    "qwen3.5-0.8b": ModelShape(
        QWEN35_08B, QWEN35_VISION, "q8_0", (768, 768), 576, "Qwen3.5-0.8B, 2,304 patches, 576 tokens"
    ),
    "gemma-3-4b": ModelShape(
        GEMMA3_4B, SIGLIP_SO400M_896, "q4_k_m", (896, 896), 256, "Gemma-3-4B, 4,096 patches, 256 tokens"
    ),
}
