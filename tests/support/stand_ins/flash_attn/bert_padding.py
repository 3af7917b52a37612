"""Tests give the stand-in rows without padding."""


def pad_input(*_, **__):
    raise NotImplementedError


def unpad_input(*_, **__):
    raise NotImplementedError
