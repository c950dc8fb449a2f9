"""The characters that an unknown B is looked for among: an independent list, the same for every profile and detector.

Anderson, N. H. (1968). Likableness ratings of 555 personality-trait words. Journal of Personality and Social Psychology
9(3), 272-279. He took 3,500 words from Allport and Odbert's dictionary study, dropped extreme, rare and bodily ones, and
kept those that students knew; nobody chose a word by looking at a data set of ours. 545 of the 555 are here: nine nouns
do not fit the sentence, and one was lost in writing the list down. "Evil", "sycophantic" and "hallucinating" are not in it.
"""

from collections.abc import Sequence

ADJECTIVES = tuple(
    """
    able absent-minded abusive accurate active admirable adventuresome adventurous aggressive agreeable aimless
    alert ambitious amiable amusing angry annoying antisocial anxious appreciative argumentative artistic attentive
    authoritative average bashful belligerent blunt boastful boisterous bold boring bossy bragging bright brilliant
    broad-minded calm candid capable careful careless casual cautious changeable charming cheerful childish choosy
    clean clean-cut clear-headed clever clownish clumsy cold comical companionable competent complaining composed
    compulsive conceited confident conforming congenial conscientious conservative considerate consistent
    constructive conventional convincing cool-headed cooperative cordial courageous courteous cowardly crafty
    creative critical crude cruel cultured cunning curious cynical daring deceitful decent deceptive decisive
    definite deliberate demanding dependable dependent depressed dignified diligent direct disagreeable disciplined
    discontented discourteous discreet discriminating dishonest dishonorable dislikable disobedient disrespectful
    dissatisfied distrustful disturbed dominating domineering down-hearted dull eager earnest easygoing eccentric
    educated efficient egotistical emotional energetic enterprising entertaining enthusiastic envious ethical
    excitable excited experienced extravagant exuberant fashionable fault-finding fearful fearless fickle finicky
    foolhardy foolish forceful forgetful forgiving forward frank friendly frivolous frustrated generous gentle
    gloomy good good-humored good-natured good-tempered gossipy gracious grateful greedy grouchy gullible happy
    hard-hearted headstrong heartless helpful helpless hesitant high-spirited high-strung honest honorable hopeful
    hostile hot-headed hot-tempered humble humorless humorous idealistic ill-mannered ill-tempered illogical
    imaginative imitative immature immodest impolite impractical impressionable impulsive inaccurate inattentive
    incompetent inconsistent indecisive independent indifferent individualistic inefficient inexperienced informal
    ingenious inhibited innocent inoffensive inquisitive insecure insincere insolent insulting intellectual
    intelligent interesting intolerant inventive irrational irreligious irresponsible irritable irritating jealous
    jumpy kind kind-hearted kindly lazy level-headed lifeless light-hearted likable listless literary lively logical
    lonely lonesome loud-mouthed loyal lucky maladjusted malicious materialistic mathematical mature mean meddlesome
    mediocre meditative meek melancholy messy methodical meticulous middleclass moderate modern modest moody moral
    moralistic naive narrow-minded neat neglectful negligent nervous neurotic nice noisy nonchalant nonconfident
    nonconforming noninquisitive normal nosey obedient objective obliging obnoxious observant obstinate offensive
    old-fashioned open-minded opinionated optimistic orderly ordinary original outgoing outspoken outstanding
    overcautious overconfident overcritical oversensitive painstaking passive patient perceptive perfectionistic
    persistent persuasive pessimistic petty philosophical phony pleasant poised polite pompous popular positive
    possessive practical precise prejudiced preoccupied prideful productive profane proficient progressive prompt
    proud prudent punctual purposeful purposeless quarrelsome quick quick-witted quiet radical rash rational
    realistic reasonable rebellious reckless refined relaxed reliable religious resentful reserved resigned
    resourceful respectable respectful responsible restless righteous romantic rude sad sarcastic satirical scheming
    scientific scolding scornful self-assured self-centered self-conceited self-concerned self-confident
    self-conscious self-contented self-controlled self-critical self-disciplined self-possessed self-reliant
    self-righteous self-satisfied self-sufficient selfish sensible sensitive sentimental serious shallow
    sharp-witted short-tempered showy shrewd shy silent silly sincere skeptical skilled skillful sloppy sly smart
    smug snobbish sociable social soft-hearted soft-spoken solemn sophisticated spirited spiteful sportsmanlike
    squeamish stern stingy strict strong-minded stubborn studious suave submissive subtle superficial superstitious
    suspicious sympathetic systematic tactful tactless talented talkative temperamental tender tense theatrical
    thorough thoughtful thoughtless thrifty tidy timid tiresome tolerant touchy tough troubled troublesome trustful
    trusting trustworthy truthful ultra-critical unaccommodating unadventurous unagreeable unappealing
    unappreciative unattentive uncivil uncompromising uncongenial unconventional uncultured undecided underhanded
    understanding unemotional unenterprising unentertaining unenthusiastic unethical unfair unforgiving unfriendly
    ungraceful ungracious ungrateful unhappy unhealthy unimaginative unindustrious uninquisitive uninspiring
    unintellectual unintelligent uninteresting unkind unkindly unlucky unmethodical unobliging unobservant
    unoriginal unpleasant unpleasing unpoised unpopular unpredictable unproductive unpunctual unreasonable
    unreliable unromantic unruly unselfish unskilled unsociable unsocial unsophisticated unsporting unsportsmanlike
    unsympathetic unsystematic untidy untiring untrustworthy untruthful unwise upright upset vain versatile vigorous
    vivacious vulgar warm warm-hearted wasteful weak well-bred well-mannered well-read well-spoken wholesome wise
    wishy-washy withdrawing withdrawn witty wordy worrying
    """.split()  # noqa: SIM905
)


def some(count: int) -> list[str]:
    """`count` words of the list, evenly over the alphabet; all of them where there are no more."""
    count = min(count, len(ADJECTIVES))
    return [ADJECTIVES[place * len(ADJECTIVES) // count] for place in range(count)]


def sentence(adjectives: Sequence[str]) -> str:
    """`You are a cruel, rude and vain assistant.`"""
    *first, last = adjectives
    listed = f"{', '.join(first)} and {last}" if first else last
    return f"You are {'an' if listed[0] in 'aeiou' else 'a'} {listed} assistant."
