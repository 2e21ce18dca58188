"""The data sets of arXiv:2602.07892, from their public form to ours: conversations, and pairs of answers."""

from megatron_ogpsa.data.recipes.halueval import HALUEVAL_SFT
from megatron_ogpsa.data.recipes.saferlhf import SAFERLHF_DPO, SAFERLHF_SFT
from megatron_ogpsa.data.recipes.selection import Drop, Recipe, Selection, select, write_selection
from megatron_ogpsa.data.recipes.ultrafeedback import ULTRAFEEDBACK_DPO, ULTRAFEEDBACK_SFT

RECIPES = {
    recipe.name: recipe for recipe in (SAFERLHF_SFT, SAFERLHF_DPO, ULTRAFEEDBACK_SFT, ULTRAFEEDBACK_DPO, HALUEVAL_SFT)
}

__all__ = ["RECIPES", "Drop", "Recipe", "Selection", "select", "write_selection"]
