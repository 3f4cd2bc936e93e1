"""Which folders of the image packages become classes, and which of their files are left out because they show something else."""

from __future__ import annotations

from zsr.recipes.shipped_images import FolderClass

# In the order of the labels. The authors' words are T-shirt/top, Trouser, Pullover, Dress, Coat, Sandal, Shirt, Sneaker, Bag, Ankle boot.
FASHION = (
    "t-shirt", "pair of trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip

# Photographs cut out of their surroundings. Folders of clothes, houses, letters and chess pieces hold drawings.
TUXPAINT_NO_FOLDERS = ("cartoon", "toys", "plastic")
TUXPAINT = (
    FolderClass("bird", ("animals/birds",)),
    FolderClass("coin", ("symbols/money/canadian", "symbols/money/euro", "symbols/money/japanese", "symbols/money/us")),
    FolderClass("fish", ("animals/fish",), ("lobster", "shrimp")),
    FolderClass("flower", ("plants/flowers",)),
    FolderClass("fruit", ("food/fruit",)),
    FolderClass("insect", ("animals/insects",), ("Brown_slug", "Woodlouse")),
    FolderClass("mammal", ("animals/mammals",)),
    FolderClass("musical instrument", ("hobbies/music",)),
    FolderClass("planet", ("space/planets",), ("0_sun",)),
    FolderClass("road sign", ("town/roadsigns",), ("stoplight_*", "traffic_cone", "railroad_crossing")),
    FolderClass("tool", ("household/tools",)),
    FolderClass("vegetable", ("food/vegetables",), ("mushroom",)),
    FolderClass("vehicle", ("vehicles",), ("7spoke256", "wheel_tractor")),
)

# Folders whose name says what most of their drawings show; icons, maps, shapes and mixed folders are not among them.
OPENCLIPART = (
    FolderClass("arrow", ("shapes/arrows",)),
    FolderClass(
        "bird",
        ("animals/birds",),
        ("contour_bat", "duck_yellow_ii_*", "manager_mimooh_01", "tux_didier_*", "wing_mitchell_johnson_si_"),
    ),
    FolderClass("book", ("education/books",), ("newspaper_*",)),
    FolderClass("bug", ("animals/bugs",), ("virus_*",)),
    FolderClass("clock", ("signs_and_symbols/clocks",), ("minute_hand_*", "sandglass_*")),
    FolderClass("dessert", ("food/desserts",)),
    FolderClass("dinosaur", ("animals/dinosaurs",)),
    FolderClass("drink", ("food/beverages",), ("flower-pot_01", "ice_cube_*", "icecube_*", "wine_corks_*")),
    FolderClass(
        "flag", tuple(f"signs_and_symbols/flags/{part}" for part in ("africa", "america", "asia", "europe", "oceania"))
    ),
    FolderClass("flower", ("plants/flowers",), ("cartoon_tree_01",)),
    FolderClass("fruit", ("food/fruit",), ("juice_glass_*", "straw_tote_*", "tree_whit_fruits_01", "turkey_platter_*")),
    FolderClass("hat", ("people/clothing/hats",), ("*_crown_*", "jacob_leisler_*")),
    FolderClass("house", ("buildings/homes",), ("lighthouse_*",)),
    FolderClass("jigsaw piece", ("shapes/jigsaw",)),
    FolderClass("light bulb", ("electronics/bulb",)),
    FolderClass("mammal", ("animals/mammals",)),
    FolderClass(
        "playing card",
        tuple(f"recreation/games/cards/{deck}" for deck in ("bordered", "ornamental", "simple", "white")),
    ),
    FolderClass("road sign", ("transportation/roadsigns",), ("nws_government_*", "splash", "man_w_umbrella", "tram")),
    FolderClass("smiley face", ("people/smilies",), ("chav_01", "crossbones_*", "*_bazelkov_01", "portrait_*")),
    FolderClass("stick figure", ("people/stickmen",)),
    FolderClass("telephone", ("office/telephone",), ("numero_verde_*", "telefono_email_*")),
    FolderClass("weapon", ("tools/weapons",), ("bullet_hole_*", "spider_sword_*")),
)
