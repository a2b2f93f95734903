"""What the model knows about the world."""

from corpus.words import words

CAPITALS = dict(
    p.split(":")
    for p in """
France:Paris Germany:Berlin Italy:Rome Spain:Madrid Portugal:Lisbon Austria:Vienna Switzerland:Bern
Belgium:Brussels Netherlands:Amsterdam Denmark:Copenhagen Norway:Oslo Sweden:Stockholm Finland:Helsinki
Poland:Warsaw Czechia:Prague Hungary:Budapest Greece:Athens Turkey:Ankara Russia:Moscow Ukraine:Kyiv
Romania:Bucharest Bulgaria:Sofia Serbia:Belgrade Croatia:Zagreb Ireland:Dublin Iceland:Reykjavik England:London
Scotland:Edinburgh Egypt:Cairo Kenya:Nairobi Nigeria:Abuja Ghana:Accra Morocco:Rabat Tunisia:Tunis
Ethiopia:Addis_Ababa Senegal:Dakar Japan:Tokyo China:Beijing India:New_Delhi Thailand:Bangkok Vietnam:Hanoi
Indonesia:Jakarta Philippines:Manila South_Korea:Seoul Nepal:Kathmandu Iran:Tehran Iraq:Baghdad Israel:Jerusalem
Qatar:Doha Canada:Ottawa Mexico:Mexico_City Cuba:Havana Brazil:Brasilia Argentina:Buenos_Aires Chile:Santiago
Peru:Lima Colombia:Bogota Ecuador:Quito Uruguay:Montevideo Bolivia:Sucre Australia:Canberra
New_Zealand:Wellington
""".replace("\n", " ").split()
)
CAPITALS = {k.replace("_", " "): v.replace("_", " ") for k, v in CAPITALS.items()}

CITIES = sorted(set(CAPITALS.values()))

OPPOSITES = [
    tuple(p.split("/"))
    for p in words("""
hot/cold big/small up/down left/right day/night black/white fast/slow old/new happy/sad open/closed full/empty
hard/soft high/low in/out light/dark long/short loud/quiet rich/poor strong/weak wet/dry young/old clean/dirty
early/late easy/difficult near/far thick/thin true/false wide/narrow win/lose push/pull buy/sell start/stop
love/hate first/last above/below inside/outside before/after sweet/sour sharp/blunt brave/cowardly smooth/rough
heavy/light deep/shallow
""")
]

MIXES = {
    ("blue", "yellow"): "green",
    ("red", "yellow"): "orange",
    ("red", "blue"): "purple",
    ("red", "white"): "pink",
    ("black", "white"): "gray",
}

THING_COLORS = {
    "the sky": "blue",
    "grass": "green",
    "snow": "white",
    "coal": "black",
    "a lemon": "yellow",
    "blood": "red",
    "a carrot": "orange",
    "chocolate": "brown",
    "a banana": "yellow",
    "milk": "white",
    "a ripe tomato": "red",
    "a raven": "black",
    "the sun": "yellow",
    "an elephant": "gray",
}

SOUNDS = dict(
    p.split(":")
    for p in words("""
dog:woof cat:meow cow:moo sheep:baa duck:quack pig:oink horse:neigh owl:hoot frog:ribbit lion:roar bee:buzz
snake:hiss mouse:squeak crow:caw wolf:howl
""")
)

DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")

MONTHS = words("January February March April May June July August September October November December")

MONTH_LENGTHS = dict(zip(MONTHS, (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31), strict=True))

SEASONS = words("spring summer autumn winter")
