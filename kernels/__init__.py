"""Ground floor: tensor mathematics of Hedgehog linear attention. Needs torch only; knows no files and no config."""
