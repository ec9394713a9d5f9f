# SPDX-License-Identifier: Apache-2.0
"""Transformer classes of Diffusers that cannot be served, each with the reason in a sentence."""

LINEAR = "its self-attention is linear, so there is no score matrix with blocks to skip"
CROSS = (
    "its image tokens attend to image and prompt together, so queries and keys are different "
    "sequences"
)
CAUSAL = "parts of its sequence are causal, which plans cannot express"
SOUND = "it generates audio, so its tokens have no frames, rows and columns"
OWN = "it already computes block-sparse attention, with a FlexAttention block mask"

DECLINED: dict[str, str] = {
    "AceStepTransformer1DModel": SOUND,
    "AnyFlowFARTransformer3DModel": OWN,
    "Cosmos3OmniTransformer": CAUSAL,
    "DreamLiteTransformer2DModel": "it is part of a UNet, not the transformer of a pipeline",
    "HunyuanVideoFramepackTransformer3DModel": "it places history frames before the video and "
    "the prompt after it, and only one of the two can be separated from the video",
    "Kandinsky6SRTransformer3DModel": f"it was trained with NABLA: {OWN}",
    "LongCatAudioDiTTransformer": SOUND,
    "MiniMaxMusic3Transformer1DModel": SOUND,
    "NucleusMoEImageTransformer2DModel": CROSS,
    "OmniGenTransformer2DModel": CAUSAL,
    "PRXTransformer2DModel": CROSS,
    "QwenImage21Transformer2DModel": CAUSAL,
    "RFD4ProteinaTransformer": "it generates proteins, so its tokens have no frames, rows and "
    "columns",
    "SanaTransformer2DModel": LINEAR,
    "SanaVideoTransformer3DModel": LINEAR,
    "SanaWMTransformer3DModel": LINEAR,
    "StableAudio3DiTModel": SOUND,
    "StableAudioDiTModel": SOUND,
    "WanAnimate2Transformer3DModel": OWN,
}
