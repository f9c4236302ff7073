"""Souping: merge several fine-tunes of one base into one model (RzenEmbed, arXiv 2510.27350v1, section 4).

    make.py         one call: parents in, a directory with the soup and its lineage out
    select.py       which parents, with which weights: greedy, searched; knows only scores
    parents.py      opens adapters and full checkpoints, and refuses those that do not belong together
    methods.py      mean, SLERP, TIES, DARE, of deltas
    factors.py      a delta as the product B.A: concatenation, SVD, inner products
    adapters.py     the soup of adapters, module by module
    checkpoints.py  the soup of full checkpoints, tensor by tensor
    tensors.py      safetensors files, read and written one tensor at a time

The mean is that of what fine-tunes do to the model. For adapters this is the mean of the products scale * B.A, for full
checkpoints that of the weights. Averaging A and B separately gives another model.
"""
