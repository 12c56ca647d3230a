"""Pairs that say the same in different words; sentences of different pairs are strangers."""

PARAPHRASES = (
    ("The train was an hour late.", "Our train arrived sixty minutes behind schedule."),
    (
        "How do I reset the password of my e-mail account?",
        "I forgot my mail password; what are the steps to get a new one?",
    ),
    ("A child is feeding ducks by the pond.", "At the pond, a little kid gives food to the ducks."),
    (
        "The central bank raised interest rates by a quarter of a percentage point on Thursday, "
        "saying that inflation remained too high.",
        "Citing stubborn inflation, the central bank lifted its key interest rate by 0.25%.",
    ),
    (
        "Water boils at a lower temperature in the mountains.",
        "At high altitude, the boiling point of water drops.",
    ),
    ("She plays the violin.", "She is a violinist."),
    (
        "Bake the bread for forty minutes, until the crust is dark and sounds hollow when tapped.",
        "The loaf needs about forty minutes in the oven; it is done when the crust is deep brown.",
    ),
    (
        "The vaccine protects most people from severe illness.",
        "Most vaccinated people do not become seriously ill.",
    ),
)
