"""Attention's own weights, folded: exact identities, and the leaner variants that need training
(after 'You Need to Pay Better Attention', Hosseini and Hosseini, arXiv 2403.01643).
"""
