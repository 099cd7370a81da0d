"""Where images come from: a module a kind of source, each with a function that lists candidates. Free of torch, but
for torchvision's own sets.
"""
