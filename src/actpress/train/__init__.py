"""Training: models, data, the loop, and the record a run leaves. Configured by Hydra, see configs/train.yaml."""
