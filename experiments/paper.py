"""What GQA (arXiv 2305.13245) reports, for figures and tables to stand beside."""

# Model -> seconds a sample (and TPU v4 chip, 8 of them) and scores (Table 1).
TABLE_1_COLUMNS = ("CNN R1", "arXiv R1", "PubMed R1", "MediaSum R1", "Multi-News R1", "WMT BLEU", "TriviaQA F1")
TABLE_1 = {
    "MHA-Large": (0.37, 46.0, (42.9, 44.6, 46.2, 35.5, 46.6, 27.7, 78.2)),
    "MHA-XXL": (1.51, 47.2, (43.8, 45.6, 47.5, 36.4, 46.9, 28.4, 81.9)),
    "MQA-XXL": (0.24, 46.6, (43.0, 45.0, 46.9, 36.1, 46.5, 28.5, 81.3)),
    "GQA-8-XXL": (0.28, 47.1, (43.5, 45.4, 47.7, 36.3, 47.2, 28.4, 81.6)),
}

# T5-Large to MQA at α = 0.05, average score: what can be read off the chart, lowest and highest (fig. 4). Its order is
# certain, its digits are not.
FIGURE_4_READ_OFF = {"mean": (55.6, 55.6), "first": (55.1, 55.4), "random": (54.6, 55.2)}

# T5-XXL by key/value heads, seconds a sample (Table 1; MHA at the smaller batch that fits).
XXL_SECONDS = {64: TABLE_1["MHA-XXL"][0], 8: TABLE_1["GQA-8-XXL"][0], 1: TABLE_1["MQA-XXL"][0]}
