"""The definition of every method, in NumPy.

Pure functions over frozen dataclasses of C-contiguous arrays. W is always
`(out_features, in_features)`, x is `(..., in_features)`.
"""
