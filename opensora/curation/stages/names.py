"""The names of the stages, without what they import."""

STAGE_NAMES = (
    "probe",
    "scenes",
    "health",
    "motion",
    "camera",
    "quality",
    "text",
    "scores",
    "duplicates",
    "captions",
)
