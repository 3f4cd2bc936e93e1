"""Where images come from before they are shards: folders, ImageNet's own tars, tables, torchvision, other sets of shards."""
