"""The twelve objects of toyworld: one drawing function per class."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .identities import RGB
from .pen import INK, METAL, WHITE, Pen, blob, box, curve, ellipse, shade

IRISES: tuple[RGB, ...] = ((60, 170, 70), (232, 160, 20), (60, 120, 220))
LAMPS: tuple[RGB, ...] = ((150, 240, 120), (255, 216, 80), (120, 220, 255))
NOSE: RGB = (236, 120, 140)


def _backpack(p: Pen) -> None:
    a, b = p.identity.proportions
    kind, w, top = p.identity.accessory, 0.66 + 0.05 * a, -0.74 + 0.05 * b
    p.paint(0, 0.5 if kind == 2 else -0.18, 0.32)
    p.stroke(ellipse(0, top + 0.04, 0.24, 0.25, 180, 360, 16), 0.14, p.detail)
    for side in (-1, 1):
        p.fill(box(side * w - 0.2, 0.1, side * w + 0.2, 0.88, 0.16), p.detail)
    p.skin(box(-w, top, w, 1, 0.45, 0.18))
    if kind == 0:
        p.fill(box(-0.43, 0.3, 0.43, 0.84, 0.1), p.detail)
        p.fill(box(-0.43, 0.3, 0.43, 0.52, 0.1), shade(p.detail, 1.25))
    elif kind == 1:
        for x in (-0.31, 0.31):
            p.fill(box(x - 0.23, 0.36, x + 0.23, 0.82, 0.1), p.detail)
    else:
        p.fill(box(-w, top, w, 0.06, 0.44, 0.2), p.detail)
        p.fill(box(-0.13, -0.08, 0.13, 0.2, 0.06), METAL)


def _bowl(p: Pen) -> None:
    a, b = p.identity.proportions
    kind, rim, deep = p.identity.accessory, -0.12, 0.44 + 0.06 * a
    p.paint(0, 0.42, 0.3)
    p.fill(box(-deep, 0.76, deep, 1, 0.06), p.detail)
    p.gloss(ellipse(-0.62, 0.22, 0.1, 0.2))
    p.skin(
        blob([(-1, rim), (-0.9, 0.32), (-0.58, 0.76), (0, 0.88), (0.58, 0.76), (0.9, 0.32), (1, rim), (0, rim - 0.1)])
    )
    p.fill(ellipse(0, rim, 1, 0.28), p.detail)
    p.fill(ellipse(0, rim, 0.84, 0.18), shade(p.main, 0.55), outline=False)
    if kind == 0:
        for x, y in ((-0.42, -0.2), (0.42, -0.2), (0, -0.4 - 0.05 * b)):
            p.fill(ellipse(x, y, 0.34, 0.34), p.detail)
            p.fill(ellipse(x - 0.1, y - 0.12, 0.09, 0.07, n=14), shade(p.detail, 1.6), outline=False)
    elif kind == 1:
        p.fill(blob([(-0.74, rim), (-0.55, -0.45), (0, -0.7 - 0.08 * b), (0.55, -0.45), (0.74, rim), (0, 0.02)]), WHITE)
        p.fill(ellipse(0, -0.74 - 0.08 * b, 0.17, 0.17), p.detail)
    else:
        p.fill(ellipse(0, rim + 0.01, 0.8, 0.17), (246, 190, 90))
        p.stroke(np.array([(0.2, -0.1), (0.4, -0.46), (0.6, -0.84)]), 0.16, METAL)
        p.fill(ellipse(0.63, -0.87, 0.16, 0.13), METAL)


def _can(p: Pen) -> None:
    a, b = p.identity.proportions
    kind, w, top = p.identity.accessory, 0.56 + 0.05 * a, -0.6 + 0.06 * b
    p.paint(0, 0.2, 0.36)
    if kind == 1:
        p.stroke(curve([(0.12, top), (0.16, -0.86), (0.3, -0.98), (0.56, -1)]), 0.16, p.detail)
    elif kind == 2:
        p.fill(ellipse(0.3, top - 0.24, 0.42, 0.3), METAL)
        p.fill(ellipse(0.3, top - 0.24, 0.27, 0.17), shade(METAL, 0.8), outline=False)
    p.gloss(box(-w + 0.12, top + 0.2, -w + 0.27, 0.8, 0.06), 100)
    p.skin(np.concatenate([ellipse(0, 0.82, w, 0.17, 0, 180), ellipse(0, top, w, 0.17, 180, 360)]))
    for y in (top, 0.68):
        p.fill(np.concatenate([ellipse(0, y + 0.15, w, 0.17, 0, 180), ellipse(0, y, w, 0.17, 180, 0)]), p.detail)
    p.fill(ellipse(0, top, w, 0.17), METAL if kind != 2 else shade(METAL, 0.45))
    if kind == 0:
        p.stroke(np.array([(-0.12, top), (0.16, top)]), 0.13, shade(METAL, 0.6), outline=False)


def _candle(p: Pen) -> None:
    a, b = p.identity.proportions
    kind, w, top = p.identity.accessory, 0.48 + 0.05 * a, -0.3 + 0.06 * b
    p.paint(0, 0.32, 0.3)
    if kind == 0:
        p.stroke(ellipse(0.74, 0.72, 0.2, 0.2, -150, 150, 20), 0.14, p.detail)
        p.fill(blob([(-0.78, 0.76), (0, 0.68), (0.78, 0.76), (0.5, 0.98), (-0.5, 0.98)]), p.detail)
    elif kind == 1:
        p.fill(ellipse(0, 0.82, 0.86, 0.2), p.detail)
    p.gloss(box(-w + 0.08, top + 0.2, -w + 0.21, 0.7, 0.05), 90)
    p.skin(np.concatenate([ellipse(0, 0.76, w, 0.14, 0, 180), ellipse(0, top, w, 0.13, 180, 360)]))
    drip = [(-w, top), (-w, top + 0.2), (-w * 0.55, top + 0.16), (-w * 0.25, top + 0.32), (0.04, top + 0.15)]
    p.fill(blob([*drip, (w * 0.55, top + 0.22), (w, top + 0.16), (w, top), (0, top - 0.13)]), shade(p.main, 1.45))
    if kind == 2:
        p.fill(
            blob([(-0.62, 0.5), (0, 0.56), (0.62, 0.5), (0.4, 0.8), (0.6, 0.98), (-0.6, 0.98), (-0.4, 0.8)]), p.detail
        )
    p.stroke(np.array([(0, top), (0, top - 0.12)]), 0.08, INK, outline=False)
    y = top - 0.08
    p.fill(blob([(0, y - 0.64), (0.2, y - 0.32), (0.24, y - 0.1), (0, y + 0.04), (-0.24, y - 0.1), (-0.18, y - 0.32)]),
           (255, 150, 30))  # fmt: skip
    p.fill(ellipse(0, y - 0.14, 0.12, 0.17), (255, 236, 130), outline=False)


def _cat(p: Pen) -> None:
    a, b = p.identity.proportions
    kind, w, y = p.identity.accessory, 0.5 + 0.05 * a, -0.34
    light = shade(p.main, 1.5)
    p.paint(0, 0.55, 0.28)
    p.stroke(curve([(0.3, 0.86), (0.72, 0.84), (0.88, 0.5), (0.72, 0.2 - 0.06 * b), (0.86, 0)]), 0.22, p.main)
    p.skin(blob([(-0.34, 0.02), (-w, 0.5), (-w, 0.88), (-0.3, 1), (0.3, 1), (w, 0.88), (w, 0.5), (0.34, 0.02)]))
    for x in (-0.2, 0.2):
        p.fill(ellipse(x, 0.93, 0.17, 0.11), light)
    for side in (-1, 1):
        ear = np.array([(side * 0.6, y - 0.08), (side * 0.52, y - 0.64), (side * 0.1, y - 0.4)])
        p.fill(ear, p.main)
        p.fill(ear * 0.55 + 0.45 * ear.mean(axis=0), NOSE, outline=False)
    p.fill(ellipse(0, y, 0.64, 0.48), p.main)
    p.fill(ellipse(0, y + 0.2, 0.28, 0.19), light, outline=False)
    for side in (-1, 1):
        p.eye(side * 0.28, y - 0.06, 0.16, IRISES[p.identity.face])
    p.fill(blob([(-0.1, y + 0.1), (0.1, y + 0.1), (0, y + 0.22)]), NOSE, outline=False)
    p.stroke(curve([(-0.14, y + 0.27), (0, y + 0.32), (0.14, y + 0.27)]), 0.06, INK, outline=False)
    if kind == 0:
        p.stroke(curve([(-0.38, 0.12), (0, 0.22), (0.38, 0.12)]), 0.18, p.detail)
        p.fill(ellipse(0, 0.3, 0.12, 0.12), (252, 206, 60))
    elif kind == 1:
        for side in (-1, 1):
            p.fill(np.array([(0, 0.18), (side * 0.42, 0.0), (side * 0.42, 0.38)]), p.detail)
        p.fill(ellipse(0, 0.19, 0.11, 0.12), shade(p.detail, 0.75))
    else:
        p.fill(np.array([(-0.3, y - 0.36), (0, -1.14), (0.3, y - 0.36)]), p.detail)
        p.fill(ellipse(0, -1.08, 0.12, 0.12), WHITE)


def _clock(p: Pen) -> None:
    a, b = p.identity.proportions
    kind, w, y, r = p.identity.accessory, 0.7 + 0.04 * a, -0.1, 0.47 + 0.02 * b
    p.paint(0, 0.64, 0.26)
    for side in (-1, 1):
        p.fill(box(side * 0.46 - 0.17, 0.8, side * 0.46 + 0.17, 1, 0.06), p.detail)
    if kind == 0:
        for side in (-1, 1):
            p.fill(ellipse(side * 0.44, -0.72, 0.32, 0.26), p.detail)
    elif kind == 1:
        p.stroke(ellipse(0, -0.66, 0.36, 0.3, 180, 360, 18), 0.15, p.detail)
    else:
        p.fill(np.array([(-w - 0.12, -0.6), (0, -1.06), (w + 0.12, -0.6)]), p.detail)
    p.skin(box(-w, -0.7, w, 0.92, 0.3 if kind != 2 else 0.06, 0.16))
    p.fill(ellipse(0, y, r + 0.06, r + 0.06), p.detail)
    p.fill(ellipse(0, y, r - 0.04, r - 0.04), WHITE, outline=False)
    for angle in (0, 90, 180, 270):
        t = np.radians(angle)
        p.fill(ellipse((r - 0.13) * np.cos(t), y + (r - 0.13) * np.sin(t), 0.05, 0.05, n=10), INK, outline=False)
    hour = np.radians((-30, -150, -60)[p.identity.face])
    minute = np.radians((-110, -40, 130)[p.identity.face])
    for t, length, width in ((hour, 0.2, 0.12), (minute, 0.3, 0.09)):
        p.stroke(np.array([(0, y), (length * np.cos(t), y + length * np.sin(t))]), width, INK, outline=False)


def _dog(p: Pen) -> None:
    a, b = p.identity.proportions
    kind, x, y = p.identity.accessory, -0.36, -0.3
    light, dark = shade(p.main, 1.5), shade(p.main, 0.72)
    belly = 0.6 + 0.04 * a
    p.paint(0.4, 0.32, 0.24)
    p.stroke(curve([(0.72, 0.16), (0.92, -0.06), (0.94, -0.36 - 0.06 * b)]), 0.2, p.main)
    for leg in (-0.14, 0.46):
        p.fill(box(leg - 0.14, 0.4, leg + 0.14, 0.96, 0.1), dark)
    p.skin(blob([(-0.5, 0.1), (0, 0.02), (0.6, 0.02), (0.84, 0.2), (0.82, belly), (0.2, belly + 0.04), (-0.46, belly)]))
    for leg in (-0.4, 0.7):
        p.fill(box(leg - 0.17, 0.36, leg + 0.17, 1, 0.1), p.main)
        p.fill(box(leg - 0.2, 0.82, leg + 0.18, 1, 0.07), light)
    if kind == 1:
        p.fill(blob([(x - 0.34, 0.06), (x, 0.14), (x + 0.42, 0.04), (x + 0.12, 0.5), (x - 0.06, 0.5)]), p.detail)
    else:
        p.stroke(curve([(x - 0.36, 0.1), (x, 0.22), (x + 0.42, 0.1)]), 0.19, p.detail)
    if kind == 0:
        p.fill(ellipse(x + 0.02, 0.32, 0.12, 0.12), (252, 206, 60))
    p.fill(ellipse(x, y, 0.56, 0.52), p.main)
    for side in (-1, 1):
        ear = [(side * 0.34, -0.48), (side * 0.6, -0.42), (side * 0.7, 0), (side * 0.6, 0.34), (side * 0.44, 0.1)]
        p.fill(blob([(x + ex, y + ey) for ex, ey in ear]), dark)
    p.fill(ellipse(x, y + 0.24, 0.34, 0.25), light, outline=False)
    for side in (-1, 1):
        p.eye(x + side * 0.21, y - 0.13, 0.16, IRISES[p.identity.face])
    p.fill(
        blob([(x - 0.11, y + 0.34), (x + 0.11, y + 0.34), (x + 0.08, y + 0.54), (x - 0.08, y + 0.54)]),
        NOSE,
        outline=False,
    )
    p.fill(ellipse(x, y + 0.17, 0.17, 0.12), INK, outline=False)
    if kind == 2:
        p.fill(blob([(x - 0.36, y - 0.4), (x - 0.26, y - 0.68), (x + 0.26, y - 0.68), (x + 0.36, y - 0.4)]), p.detail)
        p.fill(ellipse(x, y - 0.4, 0.5, 0.1), p.detail)


def _sneaker(p: Pen) -> None:
    a, b = p.identity.proportions
    kind, toe = p.identity.accessory, -0.98 - 0.03 * a
    high = -0.5 if kind == 1 else -0.16 + 0.04 * b
    p.paint(0.5, 0.24, 0.27)
    shaft = [(0.98, high), (0.96, 0.3), (0.98, 0.74), (0, 0.78), (toe, 0.74), (toe + 0.02, 0.42), (-0.66, 0.2)]
    p.skin(np.array([*shaft, (-0.3, 0.06), (-0.04, -0.18), (0.14, high - 0.06), (0.5, high + 0.04)]))
    p.fill(blob([(toe, 0.72), (toe + 0.02, 0.44), (-0.68, 0.24), (-0.46, 0.4), (-0.4, 0.72)]), WHITE)
    p.fill(box(toe - 0.04, 0.68, 1.02, 1, 0.13), p.detail)
    p.stroke(np.array([(toe + 0.06, 0.74), (0.94, 0.74)]), 0.1, WHITE, outline=False)
    p.stroke(curve([(0.16, high - 0.02), (0.54, high + 0.1), (0.94, high)]), 0.17, p.detail)
    if kind == 2:
        for x, y in ((-0.36, 0.2), (-0.04, -0.02)):
            p.stroke(np.array([(x, y), (x + 0.32, y + 0.34)]), 0.24, p.detail)
    else:
        for k in range(3 if kind == 0 else 4):
            x, y = -0.44 + 0.18 * k, 0.22 - 0.17 * k
            p.stroke(np.array([(x, y), (x + 0.26, y + 0.15)]), 0.1, p.detail, outline=False)


def _teapot(p: Pen) -> None:
    a, b = p.identity.proportions
    kind, w, top = p.identity.accessory, 0.64 + 0.04 * a, -0.3 + 0.04 * b
    p.paint(0, 0.36, 0.34)
    if kind == 2:
        p.stroke(ellipse(0, -0.16, 0.56, 0.74, 190, 350, 24), 0.16, p.detail)
    elif kind == 1:
        p.stroke(
            np.array([(0.5, -0.02), (0.76, -0.06), (0.96, 0), (0.94, 0.3), (0.82, 0.56), (0.5, 0.7)]), 0.17, p.detail
        )
    else:
        p.stroke(ellipse(0.56, 0.3, 0.36, 0.36, -100, 100, 22), 0.18, p.detail)
    p.fill(
        blob([(-0.4, 0.1), (-0.66, 0.02), (-0.8, -0.3), (-1, -0.34), (-0.98, -0.1), (-0.88, 0.3), (-0.4, 0.62)]), p.main
    )
    p.fill(box(-0.4, 0.8, 0.4, 1, 0.07), p.detail)
    p.gloss(ellipse(-0.36, 0.08, 0.13, 0.16))
    p.skin(ellipse(0, 0.32, w, 0.58))
    p.fill(
        blob([(-0.42, -0.12), (-0.3, top), (0, top - 0.1), (0.3, top), (0.42, -0.12), (0, -0.04)]), shade(p.main, 0.85)
    )
    if kind == 0:
        p.fill(ellipse(0, top - 0.26, 0.19, 0.19), p.detail)
    elif kind == 1:
        p.fill(np.array([(-0.2, top - 0.1), (0, top - 0.56), (0.2, top - 0.1)]), p.detail)
    else:
        p.fill(ellipse(0, top - 0.16, 0.26, 0.1), p.detail)


def _vase(p: Pen) -> None:
    a, b = p.identity.proportions
    kind, w, neck, lip = p.identity.accessory, 0.64 + 0.06 * a, 0.27 + 0.04 * b, -0.14
    p.paint(0, 0.5, 0.32)
    stem, yellow = (46, 140, 60), (252, 206, 60)
    heads = (((0.0, -0.72),), ((-0.5, -0.6), (0.5, -0.6), (0.0, -0.74)), ((-0.32, -0.66), (0.32, -0.66)))[kind]
    for x, y in heads:
        p.stroke(curve([(x * 0.2, 0.1), (x * 0.5, -0.2), (x, y)]), 0.11, stem, outline=False)
    if kind != 1:
        for side in (-1, 1):
            p.fill(blob([(0, lip), (side * 0.3, -0.42), (side * 0.62, -0.4), (side * 0.36, -0.16)]), stem)
    for x, y in heads:
        if kind == 2:
            cup = [(-0.29, -0.26), (-0.13, -0.1), (0, -0.32), (0.13, -0.1), (0.29, -0.26), (0.24, 0.17), (-0.24, 0.17)]
            p.fill(blob([(x + cx, y + cy) for cx, cy in cup], 4), p.detail)
            continue
        r = 0.36 if kind == 0 else 0.29
        t = np.radians(np.arange(0, 360, 9))
        petals = (1 + 0.2 * np.cos(5 * t))[:, None] * np.stack([np.cos(t), np.sin(t)], axis=1) * r
        p.fill(petals * 0.95 + (x, y), p.detail)
        p.fill(ellipse(x, y, r * 0.4, r * 0.4, n=16), yellow, outline=False)
    p.gloss(ellipse(-w * 0.58, 0.38, 0.09, 0.2))
    right = [(neck, lip), (neck, 0.06), (w, 0.38), (w * 0.94, 0.66), (0.34, 0.98)]
    p.skin(blob([*right, (0, 1), *[(-x, y) for x, y in reversed(right)]]))
    p.fill(ellipse(0, lip, neck + 0.1, 0.11), p.detail)
    p.fill(box(-0.36, 0.88, 0.36, 1, 0.05), p.detail)


def _boot(p: Pen) -> None:
    a, b = p.identity.proportions
    kind, x0, toe = p.identity.accessory, -0.22 - 0.04 * a, -0.86 - 0.04 * b
    p.paint(0.19, -0.28, 0.29)
    if kind == 0:
        p.stroke(ellipse(0.2, -0.84, 0.2, 0.2, 180, 360, 14), 0.13, p.detail)
    p.gloss(box(x0 + 0.1, -0.5, x0 + 0.22, 0.1, 0.05), 90)
    back = np.array([(0.64, -0.86), (0.62, 0.3), (0.68, 0.84), (toe, 0.84)])
    instep = curve([(toe, 0.84), (toe + 0.02, 0.5), (toe + 0.26, 0.34), (x0 - 0.06, 0.24), (x0, -0.1), (x0, -0.86)])
    p.skin(np.concatenate([back, instep]))
    p.fill(box(toe - 0.05, 0.76, 0.3, 1, 0.09), p.detail)
    p.fill(box(0.16, 0.76, 0.74, 1.02, 0.07), p.detail)
    if kind == 1:
        p.stroke(np.array([(x0 - 0.02, 0.26), (0.64, 0.22)]), 0.2, p.detail)
        p.fill(box(0.06, 0.1, 0.34, 0.38, 0.05), (252, 206, 60))
    high = 0.34 if kind == 2 else 0.2
    p.fill(box(x0 - 0.07, -0.94, 0.7, -0.94 + high, 0.09), p.detail)


def _toy(p: Pen) -> None:
    a, b = p.identity.proportions
    kind, w, h = p.identity.accessory, 0.54 + 0.04 * a, 0.56 + 0.05 * b
    p.paint(0, 0.4, 0.27)
    for side in (-1, 1):
        p.stroke(np.array([(side * w, 0.14), (side * 0.8, 0.24), (side * 0.86, 0.5)]), 0.19, METAL)
        p.fill(ellipse(side * 0.86, 0.6, 0.18, 0.18), p.detail)
        p.fill(box(side * 0.27 - 0.22, 0.7, side * 0.27 + 0.22, 1, 0.08), p.detail)
    if kind == 0:
        p.stroke(np.array([(0, -0.6), (0, -0.86)]), 0.11, METAL)
        p.fill(ellipse(0, -0.93, 0.15, 0.15), p.detail)
    elif kind == 1:
        for side in (-1, 1):
            p.stroke(np.array([(side * 0.26, -0.6), (side * 0.44, -0.88)]), 0.11, METAL)
            p.fill(ellipse(side * 0.46, -0.92, 0.13, 0.13), p.detail)
    else:
        p.fill(ellipse(0, -0.68, 0.3, 0.3), p.detail)
    for side in (-1, 1):
        p.fill(box(side * (h + 0.03) - 0.1, -0.46, side * (h + 0.03) + 0.1, -0.16, 0.05), p.detail)
    p.skin(box(-w, 0.0, w, 0.84, 0.1))
    p.fill(box(-h, -0.7, h, 0.06, 0.16), p.main)
    p.fill(box(-h + 0.1, -0.58, h - 0.1, -0.2, 0.1), INK, outline=False)
    for side in (-1, 1):
        p.fill(ellipse(side * 0.22, -0.39, 0.14, 0.14), LAMPS[p.identity.face], outline=False)
    p.stroke(np.array([(-0.18, -0.08), (0.18, -0.08)]), 0.09, INK, outline=False)


DRAWINGS: dict[str, Callable[[Pen], None]] = {
    "backpack": _backpack,
    "bowl": _bowl,
    "can": _can,
    "candle": _candle,
    "cat": _cat,
    "clock": _clock,
    "dog": _dog,
    "sneaker": _sneaker,
    "teapot": _teapot,
    "vase": _vase,
    "boot": _boot,
    "toy": _toy,
}
"""Class name to the function that draws it with a `Pen`."""
