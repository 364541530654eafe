"""What XLA makes of a program for an NVIDIA card, read without that card.

`compiler` compiles for a card of `cards`; `hlo` and `machine_code` read what came out;
`bounds` says how long it takes at least; `programs` are what is compiled.
"""
