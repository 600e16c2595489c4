"Repairs and checks on planted damage and on healthy rows: each has a floor for its recall and for its precision."
import json, pickle, random, sysconfig
from functools import partial
from pathlib import Path
import pytest
from llmops_kit.data.cleaning import REPAIRS, fix_controls, fix_unicode, looks_like_code, strip_boilerplate
from llmops_kit.data.quality import CHECKS, cleaning_steps, language_check, language_of, length_check, quality_check, read_lexicon, toxicity, toxicity_check
from llmops_kit.runs.errors import UserError

def row(answer, prompt="What now?"): return {"id": "1", "group": "1", "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}

SENTENCES = {
    "en": ["The parcel left our warehouse on Monday and should arrive by Friday.", "Please restart the router and wait two minutes.", "To reset your password, open the settings page.", "Thank you, that helped a lot today!"],
    "de": ["Das Paket hat unser Lager am Montag verlassen und kommt bis Freitag an.", "Bitte starten Sie den Router neu und warten Sie zwei Minuten.", "Wie setze ich mein Passwort zurück, wenn es weg ist?", "Vielen Dank, das hat mir sehr geholfen!"],
    "fr": ["Le colis a quitté notre entrepôt lundi et devrait arriver vendredi.", "Veuillez redémarrer le routeur et attendre deux minutes.", "Comment réinitialiser mon mot de passe oublié ?", "Merci, cela m'a beaucoup aidé aujourd'hui !"],
    "es": ["El paquete salió de nuestro almacén el lunes y debería llegar el viernes.", "Reinicie el router y espere dos minutos, por favor.", "¿Cómo restablezco mi contraseña olvidada?", "Muchas gracias, eso me ayudó mucho ayer."],
    "it": ["Il pacco ha lasciato il nostro magazzino lunedì e dovrebbe arrivare venerdì.", "Riavvii il router e aspetti due minuti, per favore.", "Come posso reimpostare la mia password?", "Grazie mille, mi è stato molto utile!"],
    "pt": ["A encomenda saiu do nosso armazém na segunda-feira e deve chegar na sexta.", "Reinicie o roteador e aguarde dois minutos, por favor.", "Como faço para redefinir a minha senha?", "Muito obrigado, isso ajudou bastante ontem!"],
    "nl": ["Het pakket heeft ons magazijn maandag verlaten en komt vrijdag aan.", "Start de router opnieuw op en wacht twee minuten.", "Hoe stel ik mijn wachtwoord opnieuw in?", "Dank je wel, dat heeft erg geholpen!"],
    "pl": ["Paczka opuściła nasz magazyn w poniedziałek i powinna dotrzeć do piątku.", "Proszę ponownie uruchomić router i poczekać dwie minuty.", "Jak mogę zresetować swoje hasło?", "Dziękuję bardzo, to naprawdę pomogło!"],
    "ru": ["Посылка покинула наш склад в понедельник и должна прибыть в пятницу.", "Пожалуйста, перезагрузите роутер и подождите две минуты.", "Как мне сбросить забытый пароль?", "Спасибо, это очень помогло вчера!"],
    "hi": ["पार्सल सोमवार को हमारे गोदाम से निकला और शुक्रवार तक पहुँच जाना चाहिए।", "कृपया राउटर को फिर से चालू करें और दो मिनट प्रतीक्षा करें।", "मैं अपना पासवर्ड कैसे बदलूँ?", "धन्यवाद, इससे मुझे बहुत मदद मिली!"],
    "zh": ["包裹星期一已经离开我们的仓库，预计星期五送达。", "请重新启动路由器，然后等待两分钟。", "请问我应该怎么重置我的密码？", "谢谢你，这对我的帮助真的很大！"],
    "ja": ["荷物は月曜日に倉庫を出て、金曜日までに届く予定です。", "ルーターを再起動して、二分ほどお待ちください。", "パスワードをリセットするにはどうすればいいですか？", "ありがとうございます、とても助かりました。"],
    "ar": ["غادر الطرد مستودعنا يوم الاثنين ومن المتوقع أن يصل يوم الجمعة.", "يرجى إعادة تشغيل جهاز التوجيه والانتظار دقيقتين.", "كيف يمكنني إعادة تعيين كلمة المرور؟", "شكرا لك، لقد ساعدني ذلك كثيرا."]}
PROSE = [t for texts in SENTENCES.values() for t in texts]
CODE = ["def area(w, h):\n    return w * h", "SELECT name, price FROM orders\nWHERE customer = 'Ada'\nORDER BY price;", "for (let i = 0; i < n; i++) {\n  sum += a[i];\n}", '{"name": "Ada", "born": 1815}',
        "#include <stdio.h>\nint main() {\n  printf(\"hi\\n\");\n  return 0;\n}", "$ git add .\n$ git commit -m 'x'", "<ul>\n  <li>{{ item }}</li>\n</ul>", "public class A {\n  private int x;\n}",
        "x = np.zeros((3, 3))\nx[0, 0] += 1\nprint(x)", "fn main() {\n    let x = 5;\n    println!(\"{}\", x);\n}"]
SHORT = ["42", "No.", "yes", "👍", "π ≈ 3.14", "{}", "[]", "A", "OK!", "C12H22O11", "-273.15 °C", "10:30", "NATO", "€5", "A) Paris", "(a+b)^2 = a^2 + 2ab + b^2"]
FORMS = ["| a | b |\n|---|---|\n| 1 | 2 |", "1. Open the menu\n2. Press OK\n3. Wait", "- [ ] milk\n- [x] eggs", "# Title\n\nText with *stress* and `code`.", "$\\frac{a}{b} = \\sqrt{c^2+d^2}$ holds for all $a$.",
         "Dear Ms Lee,\n\nthank you for your letter.\n\nBest,\nTom", "Roses are red,\nviolets are blue,\nsugar is sweet\nand so are you.", "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer.",
         "Row, row, row your boat gently down the stream. Merrily, merrily, merrily, merrily, life is but a dream.", "WARNING: do not open.", "See https://example.com/a/very/long/path/that/goes/on?with=parameters&and=more#anchor for more.",
         "A 404 error means that the page is gone; check the address.", "Is 3 < 5 and 7 > 5?\nYes.", "[Ada] wrote this: \"a note\".", "Try:\n```python\nprint(1)\n```\nIt prints 1."]
HEALTHY = PROSE + CODE + SHORT + FORMS

def share(found): found = list(found); return sum(map(bool, found))/len(found)


# -- Unicode

def misread(text, encoding): return text.encode("utf-8").decode(encoding)

def test_text_decoded_wrongly_is_repaired():
    "All of what was read as Western text; of Windows-1251 as much as ftfy can, though it sees only lines with a trace."
    from ftfy import fix_text
    ours,theirs = {},{}
    for encoding in ("cp1252", "latin-1", "cp1251"):
        planted = []
        for text in PROSE + ["It’s “fine” – café, naïve, 25 °C …", "Łódź, Kraków i Gdańsk są miastami"]:
            try: planted.append((misread(text, encoding), text))
            except UnicodeDecodeError: pass
        planted = [(bad, text) for bad,text in planted if bad != text]
        ours[encoding] = share(fix_unicode(bad) == text for bad,text in planted)
        theirs[encoding] = share(fix_text(bad, uncurl_quotes=False, fix_character_width=False) == text for bad,text in planted)
    assert ours == theirs and ours["cp1252"] == ours["latin-1"] == 1 and ours["cp1251"] > 0.4

def test_healthy_text_is_left_alone():
    for repair in (fix_unicode, fix_controls):
        assert [t for t in HEALTHY if repair(t) != t] == []
    assert [t for t in HEALTHY if strip_boilerplate(t) != t] == []

def test_composed_accents_and_idempotence():
    assert fix_unicode("cafe\u0301 \u1100\u1161") == "café 가"
    for text in [misread(PROSE[9], "cp1252"), "\x1b[1mbold\x1b[0m\r\nx\u200by", "<p>a &amp; b</p>\n\n-- \nTom"]:
        for repair in REPAIRS.values(): assert repair(repair(text)) == repair(text)

def test_source_code_survives_byte_for_byte():
    "Every readable source file of the standard library: 0.1 % at most may change, and only by what is invisible or a table of characters."
    lib = Path(sysconfig.get_path("stdlib"))
    files = sorted(p for package in ("asyncio", "email", "encodings", "html", "idlelib", "json", "re", "unittest", "xml") for p in (lib/package).rglob("*.py"))
    texts = [p.read_bytes().decode() for p in [*files, *sorted(lib.glob("*.py"))]]
    changed = {name: sum(repair(t) != t for t in texts) for name,repair in REPAIRS.items()}
    assert len(texts) > 400 and changed["controls"] == changed["boilerplate"] == 0 and changed["unicode"] <= 1


# -- control characters

@pytest.mark.parametrize("bad,good", [
    ("a\r\nb\rc\x0cd\u2028e", "a\nb\nc\nd\ne"), ("\ufeffstart\ufeffmid", "startmid"), ("zero\u200bwidth\u2060no\u00adbreak", "zerowidthnobreak"),
    ("\x1b[31;1mred\x1b[0m \x1b]0;title\x07text", "red text"), ("a\u202eb\u202cc", "abc"), ("\u2066x\u2069", "x"), ("nul\x00 bell\x07 del\x7f", "nul bell del"),
    ("hi\U000e0001\U000e0069\U000e0067", "hi"), ("x\u200dy a\u200cb", "xy ab"), ("😀\u200d text", "😀 text"), ("שלום\u202eabc", "שלוםabc"), ("tab\tand\nline", "tab\tand\nline")])
def test_what_is_invisible_goes(bad, good): assert fix_controls(bad) == good

@pytest.mark.parametrize("text", [
    "👩‍👩‍👧‍👦", "🏳️‍🌈", "❤️‍🔥", "👩🏽‍⚕️", "🧑🏿‍🚀", "👁️‍🗨️", "🏴‍☠️", "🐻‍❄️", "🏴󠁧󠁢󠁥󠁮󠁧󠁿 🏴󠁧󠁢󠁳󠁣󠁴󠁿", "1️⃣ ™️ ℹ️", "🇩🇪",
    "می‌خواهم کتاب‌های خوب", "اے‌سی", "ه‍", "क्‍ष", "र्‍य", "ન્‌ય", "র‍্য", "শ্ৰী‌", "ශ්‍රී", "ಕ್‌ಷ", "ರ‍್ಯ", "ന്‍", "తమ్‌ముడు", "ភាសា\u200bខ្មែរ", "ภาษา\u200bไทย", "မြန်မာ\u200bစာ", "עברית \u200e(abc)\u200f \u2067x\u2069"])
def test_joiners_that_are_spelling_stay(text): assert fix_controls(text) == text


# -- boilerplate

BOILERPLATE = {
    "<p>Tom &amp; Ann&#39;s caf&eacute;<br/>opens at&nbsp;8.</p>": "Tom & Ann's café\nopens at 8.",
    "Press <b>OK</b> and <span style=\"color: red\">wait</span>.<!-- ad -->": "Press OK and wait.",
    "Use <a href='/x'>this</a>, not `<b>`.": "Use this, not `<b>`.",
    "We use cookies to improve your experience on our site.\n\nOpening hours: 8 to 5.": "Opening hours: 8 to 5.",
    "By continuing to browse you agree to our use of cookies.\nAccept all cookies\nWelcome.": "Welcome.",
    "It is done.\n\nSent from my iPhone": "It is done.", "Geht klar.\n\nVon meinem iPhone gesendet": "Geht klar.", "Fine.\n\nGet Outlook for Android": "Fine.",
    "See you.\n-- \nTom Lee\nSupport": "See you.",
    "Yes.\n\nOn Mon, 3 Mar 2025 at 10:12, Ann Lee <ann@example.com> wrote:\n> Is it?\n>\n> Ann": "Yes.",
    "Ja.\n\nAm 03.03.2025 um 10:12 schrieb Ann Lee:\n> Ist es so?": "Ja.",
    "Done.\n\n-----Original Message-----\nFrom: Ann\nSent: Monday\nTo: Tom\nSubject: x\n\nPlease do it.": "Done.",
    "Done.\n\n________________________________\nFrom: Ann\nSent: Monday\n\nPlease do it.": "Done."}

def test_boilerplate_goes():
    assert {bad: strip_boilerplate(bad) for bad in BOILERPLATE} == BOILERPLATE

@pytest.mark.parametrize("text", [
    "In HTML, <b>bold</b> is a tag.", "Write &amp; for an ampersand: it is an entity.", "We use cookies to keep you signed in.", "We use cookies to improve your experience.", "Sent from my iPhone",
    "My note said:\nSent from my iPhone, I think.", "On Monday Ann wrote:\nI am fine.", "A --\nB", "print('<p>a &amp; b</p>')\nx = 1", "```html\n<p>&amp;</p>\n```", "> quoted\n> text", "List<String> a = new ArrayList<>();", "AT&T; R&D; Q&A"])
def test_what_only_looks_like_boilerplate_stays(text): assert strip_boilerplate(text) == text

def test_long_hostile_texts_take_no_long_time():
    import time
    start = time.process_time()
    for text in ("\n"*20000, "<p"*20000, "&a"*20000, ">\n"*20000 + "x", "a\n"*20000, "On " + "x"*50000, "{"*20000, "a."*20000, "a "*20000, "!"*50000, "=" * 50000, "`"*20001, "```\n"*5001, "f*"*9000, "aaaa" * 9000,
                 "cookies we use cookies " * 3000, "\u200d"*20000, "Ã"*20000, "<!--"*9000, "(" * 30000, "f(" * 15000):
        for repair in REPAIRS.values(): repair(text)
        for check in CHECKS.values(): check(row(text))
        language_check(row(text), ("en",))
    assert time.process_time() - start < 30 # a quadratic search takes minutes


# -- code

def test_code_and_prose_are_told_apart():
    assert share(map(looks_like_code, CODE)) >= 0.9
    assert [t for t in PROSE if looks_like_code(t)] == []


# -- language

def test_languages_are_recognised_and_doubt_keeps_the_row():
    planted = [(l, t) for l,texts in SENTENCES.items() for t in texts]
    assert share(language_of(t) == l for l,t in planted) >= 0.85
    assert [t for l,t in planted if language_check(row(t, ""), (l,))] == [] # nothing wanted is dropped
    others = [(l, t) for l,t in planted if l != "en"]
    dropped = [language_check(row(t, ""), ("en",)) for _,t in others]
    assert share(dropped) >= 0.85 and {d for d in dropped if d} == {f"language: {l}" for l in SENTENCES if l != "en"}

def test_undecided_texts_stay():
    assert [t for t in CODE + SHORT if language_check(row(t, "x"), ("sw",))] == []


# -- quality

BAD = {
    "nothing written": ["...", "???", "---", "… — …"], "damaged characters": ["Caf\ufffd, na\ufffdve and \ufffdber", "\ufffd"*40],
    "placeholder text": ["Lorem ipsum dolor sit amet, consectetur.", "Intro. LOREM IPSUM DOLOR"],
    "error page": ["404 Not Found", "Error 403: Forbidden", "Access denied", "Please enable JavaScript to continue.", "Page not found", "JavaScript is disabled in your browser.", "Just a moment... checking your browser"],
    "unfinished JSON": ['{"name": "Ada", "born": 18', '[{"a": 1}, {"a"', '{"text": "and then', '{"a": [1, 2'],
    "unfinished code block": ["Try this:\n```python\nprint(1)", "```\nls"],
    "mostly symbols": ["~~~***~~~ ### >>> !!! <<< ### ~~~***~~~ new", "★★★★★ ►►►►► ♥♥♥♥♥ ■■■■■ ok", "_-^-_-^-_-^-_-^-_-^-_ hi"],
    "repeated lines": ["Buy now\nCall us\n"*6, "Home\n"*8, "a b\nc d\ne f\n"*5],
    "repeated words": ["I do not know what I do "*8, "the the the the "*10, "very good "*20, "我不知道"*12, "Return the value of the value of "*6],
    "odd words": ["T h i s   w a s   a   s c a n n e d   p a g e .", "iVBORw0KGgoAAAANSUhEUgAAAAUA"*12],
    "all capitals": ["READ THIS NOW BECAUSE THE OFFER ENDS ON FRIDAY AT NOON", "ВНИМАНИЕ ВСЕМ ПОКУПАТЕЛЯМ: СКИДКИ ТОЛЬКО СЕГОДНЯ И ЗАВТРА ВЕЧЕРОМ"]}

@pytest.mark.parametrize("reason", sorted(BAD))
def test_bad_answers_are_found(reason): assert share(quality_check(row(t)) == reason for t in BAD[reason]) == 1

def test_healthy_answers_pass_every_check():
    assert [(t, quality_check(row(t))) for t in HEALTHY if quality_check(row(t))] == []
    assert [t for t in HEALTHY if toxicity_check(row(t))] == []

def test_a_conversation_is_judged_by_its_answer_and_a_label_by_its_text():
    assert quality_check(row("Fine.", "LOREM IPSUM DOLOR")) == ""
    assert quality_check(row("spam", "Lorem ipsum dolor") | {"label": "spam"}) == "placeholder text"
    assert quality_check({"id": "1", "group": "1", "text": "very good "*20}) == "repeated words"
    call = row("") ; call["messages"][-1]["tool_calls"] = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    assert length_check(call, min_characters=5) == "" and length_check(row(""), min_characters=5) == "too short"


# -- toxicity

TOXIC = ["You asshole.", "what a B1TCH", "f*ck off", "F U C K this", "f.u.c.k", "fuuuuuck", "You idiot, you moron!", "go kill yourself.", "you $hitty idi0t", "motherf*cker", "Wh0re!", "those fuckers", "sh*t, bull$hit", "you @sshole", "KYS"]
HARMLESS = ["The assassin left Scunthorpe for Penistone with a class of cockatoos.", "class Bass(Glass): pass", "Shih Tzu, shiitake, Dickens, Cockburn and Essex", "Analysis of the cumulative title", "The Idiot is a novel by Dostoevsky.",
            "0x455 4553 b00b a55 s*t*u", "Shut the door. Up we go.", "Kill the process yourself.", "y = 2*x*y + a*b + c**t", "She sells sea shells", "A b c d e f g", "Matsushita hit the shuttle", "go, die Tür ist zu"[:3], "$HIT_COUNT += 1", "a grape, a therapist and a mishit"]

def test_insults_are_found_and_their_lookalikes_are_not():
    assert [t for t in TOXIC if not toxicity_check(row(t))] == []
    assert [t for t in HARMLESS if toxicity_check(row(t))] == []
    assert toxicity_check(row("Fine.", "You asshole.")) == "toxic"

def test_a_word_list_of_ones_own(tmp_path):
    words = tmp_path/"words.txt"
    words.write_text("# ours\nblockhead\nnoodle\t0.5\nwet noodle\t1\n")
    assert read_lexicon(words) == {"blockhead": 1, "noodle": 0.5, "wet noodle": 1}
    assert toxicity("You bl0ckhead, asshole", str(words)) == (1, ["blockhead"])
    assert toxicity_check(row("a noodle"), str(words)) == "" and toxicity_check(row("a wet noodle"), str(words)) == "toxic"
    for text,problem in (("", "is empty"), ("bad\tvery\n", "Line 1 .* no weight")):
        words.write_text(text)
        with pytest.raises(UserError, match=problem): read_lexicon(words)
    with pytest.raises(UserError, match="cannot be read"): cleaning_steps(["toxicity"], lexicon=str(tmp_path/"none.txt"))


# -- steps

def test_steps_by_name_travel_to_workers_and_their_reasons_can_be_counted():
    repairs,checks = cleaning_steps(["toxicity", "quality", "boilerplate", "unicode", "controls"], min_characters=2, max_characters=500, languages=["en"])
    assert (list(repairs), list(checks)) == (["unicode", "controls", "boilerplate"], ["length", "language", "quality", "toxicity"])
    repairs,checks = pickle.loads(pickle.dumps((repairs, checks)))
    rows = [row(t) for t in HEALTHY + TOXIC + sum(BAD.values(), [])]
    reasons = {check(r) for check in checks.values() for r in rows}
    assert not any(c.isdigit() for reason in reasons for c in reason) and max(map(len, reasons)) < 30
    with pytest.raises(UserError, match="no cleaning step unicde. Did you mean unicode"): cleaning_steps(["unicde"])
    with pytest.raises(UserError, match="no language english"): cleaning_steps([], languages=["english"])
