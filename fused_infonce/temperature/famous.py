"""Temperatures that widely used libraries start with."""

FAMOUS = {
    0.02: "FlagEmbedding",
    0.05: "sentence-transformers (scale=20), SimCSE",
    0.07: "MoCo, the start of CLIP",
    0.1: "info-nce-pytorch, SimCLR",
    0.5: "lightly's NTXentLoss",
}
