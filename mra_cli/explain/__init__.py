"""Which part of attention matters: after 'On Explaining with Attention Matrices' (Naim and Asher,
arXiv 2410.18541) and 'On Identifiability in Transformers' (Brunner et al., arXiv 1908.04211).
"""
