# SPDX-License-Identifier: Apache-2.0
"""Transformer classes of Diffusers that cannot be served, each with the reason in a sentence."""

LINEAR = "its self-attention is linear: there is no map of scores to leave blocks out of"
CROSS = (
    "its picture tokens query picture and prompt at once: queries and keys are not one sequence"
)
CAUSAL = "parts of its sequence see only what stands before them, which no plan here can express"
SOUND = "it makes sound: its tokens are one line, with no frames, rows and columns"
OWN = "it computes block-sparse attention by itself, with FlexAttention's block mask"

DECLINED: dict[str, str] = {
    "AceStepTransformer1DModel": SOUND,
    "AnyFlowFARTransformer3DModel": OWN,
    "Cosmos3OmniTransformer": CAUSAL,
    "DreamLiteTransformer2DModel": "it is a part of a UNet, not the transformer of a pipeline",
    "HunyuanVideoFramepackTransformer3DModel": "it packs frames of history before the video and "
    "the prompt behind it, and only one of the two sides can be told from video here",
    "Kandinsky6SRTransformer3DModel": f"it was trained with NABLA: {OWN}",
    "LongCatAudioDiTTransformer": SOUND,
    "MiniMaxMusic3Transformer1DModel": SOUND,
    "NucleusMoEImageTransformer2DModel": CROSS,
    "OmniGenTransformer2DModel": CAUSAL,
    "PRXTransformer2DModel": CROSS,
    "QwenImage21Transformer2DModel": CAUSAL,
    "RFD4ProteinaTransformer": "it makes proteins: its tokens are no frames, rows and columns",
    "SanaTransformer2DModel": LINEAR,
    "SanaVideoTransformer3DModel": LINEAR,
    "SanaWMTransformer3DModel": LINEAR,
    "StableAudio3DiTModel": SOUND,
    "StableAudioDiTModel": SOUND,
    "WanAnimate2Transformer3DModel": OWN,
}
