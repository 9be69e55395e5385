"""Channels, hidden units and attention heads: which weights they are, and networks without those that are zero."""

from fipgeo.shrink.attention import NarrowAttention
from fipgeo.shrink.groups import ChannelGroups, Family, channel_groups, shrink
from fipgeo.shrink.masks import as_masks, to_dense_, to_prune_

__all__ = [
    "ChannelGroups",
    "Family",
    "NarrowAttention",
    "as_masks",
    "channel_groups",
    "shrink",
    "to_dense_",
    "to_prune_",
]
