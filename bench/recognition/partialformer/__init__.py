"""PartialFormer: a Transformer whose attention heads carry the feed-forward networks.

Source: Zheng et al., *PartialFormer: Modeling Part Instead of Whole for Machine Translation*, Findings of ACL 2024.
"""
