"""Every source is looked at: read, decoded, shown to the ViT, and what it says kept in the file of scores."""
