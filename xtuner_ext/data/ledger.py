"""Which samples were left out of a run, and why."""

REASONS = (
    "json",  # the line is no JSON
    "format",  # a field is missing, or has another type or value than expected
    "conversation",  # turns are broken: roles, order, text
    "placeholder",  # placeholders do not match the images or the video
    "missing_file",
    "unreadable_image",
    "unreadable_video",
    "no_images_allowed",  # the model has no image front end
    "too_long",
    "nothing_trained",
)
