"""Souping: several fine-tunes of one base as one (RzenEmbed, arXiv 2510.27350v1, section 4), and what else merges them.

    make.py         one call: parents in, a directory with the soup and its lineage out
    select.py       which parents, with which weights: greedy, searched; knows scores alone
    parents.py      opens adapters and full checkpoints, and refuses those that do not belong together
    methods.py      mean, SLERP, TIES, DARE, of deltas
    factors.py      a delta as the product B.A: concatenation, SVD, inner products
    adapters.py     the soup of adapters, module by module
    checkpoints.py  the soup of full checkpoints, tensor by tensor
    tensors.py      safetensors files, read and written one tensor at a time

The mean is taken of what fine-tunes do to the model: of the products scale * B.A of adapters, of the weights of full
checkpoints. Averaging A and B separately is something else.
"""
