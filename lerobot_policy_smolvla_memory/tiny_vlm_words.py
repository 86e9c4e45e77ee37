"""Words that a tiny VLM's tokenizer is made from where it must not depend on anybody's instructions.

A pretrained policy brings its tokenizer along, so its words must serve tasks that nobody has thought of yet. These are
common words of instructions for a robot that handles things; any other word is spelt.
"""

WORDS = """
a about across again all an and any apart area around as aside at away back backward base basket before behind belt
bench beside between big bin black block blue body book bottle bottles bottom bowl box bring brown by cabinet camera
can cap card carefully carry carton center chair change check chemical circle clean clear close cloth cluttered colour
container conveyor corner cover crate cube cup cylinder daily deposit designated desk dish door down drawer drive drop
each edge electronic empty end face facing fetch first flask flat floor forward from front gently get give glass grasp
green grey grip guidance hand handle heavy hold in inside instruction into it item its keep knob label large lay leave
left lid lift light line location lower machine mark marked material metal middle most motion mouth move moving near
next object of off on once one onto open orange other out outside over package pallet parcel part pass pedestal pick
piece pink place placed placement plastic plate point pose position precisely press pull purple push put rack raise
reach red release remove requirements rest ring robot roll rotate round row running scale second set shelf side sign
slide slowly small sort specified square stack stand start starting station stop storage surface swap table take tall
target task that the them then there thing third this tile tin to tool top touch towards transfer tray turn turquoise
two under until up upper upright upside using vertical violet visual wait wall way weigh when where which while white
with wooden work workpiece yellow
"""
