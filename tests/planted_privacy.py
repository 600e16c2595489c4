"Texts with planted personal data and secrets whose places are known, and look-alikes that hold none. Made from a seed; no value belongs to anyone."
import json, random, string, uuid
from hashlib import sha1, sha256
from typing import NamedTuple

import phonenumbers
from phonenumbers import PhoneNumberFormat as Format, PhoneNumberType as Type
from stdnum import luhn, verhoeff
from stdnum.br import cpf
from stdnum.ch import ssn as ahv
from stdnum.cz import rc
from stdnum.de import idnr
from stdnum.es import dni, nie
from stdnum.fi import hetu
from stdnum.fr import nir
from stdnum.it import codicefiscale
from stdnum.mx import curp
from stdnum.no import fodselsnummer
from stdnum.pl import pesel
from stdnum.se import personnummer
from stdnum.tr import tckimlik

class Planted(NamedTuple):
    text: str
    spans: list   # (kind, start, end)
    form: str     # sentence, json, csv, code, log, block; for look-alikes what they look like

DIGITS,UPPER,LOWER = string.digits, string.ascii_uppercase, string.ascii_lowercase
ALNUM,HEX = string.ascii_letters + DIGITS, "0123456789abcdef"
drawn = lambda r, letters, n: "".join(r.choices(letters, k=n))
FIRST = ["ana", "bob", "chloe", "dmitri", "elif", "femi", "gita", "hugo", "ines", "jürgen", "kofi", "lena", "maría", "noor", "olaf", "priya"]
LAST = ["silva", "smith", "dubois", "ivanov", "yilmaz", "okafor", "rao", "martin", "costa", "weiss", "mensah", "berg", "lópez", "haddad", "lund"]
HOSTS = ["gmail.com", "acme.co.uk", "mail.example.org", "firma.de", "univ-lyon.fr", "dept.state.gov", "startup.io", "correo.com.br", "posta.it", "shop.online",
         "müller-bau.de", "hospital.health", "x.com", "a-b-c.net", "students.uni.edu", "post.co.jp", "sub.team.acme.dev"]

def emails(r):
    a,b,h = r.choice(FIRST), r.choice(LAST), r.choice(HOSTS)
    plain = r.choice([f"{a}.{b}@{h}", f"{a}{r.randrange(99)}@{h}", f"{a[0]}_{b}@{h}", f"{a}+news@{h}", f"{a}-{b}.jr@{h}", f"{b}@{h}", f"{a}.o'{b}@{h}"])
    return plain.upper() if r.random() < 0.05 else plain

REGIONS = "US CA GB IE DE AT CH FR BE NL LU ES PT IT GR PL CZ HU RO BG SE NO DK FI TR RU UA IL AE SA EG ZA NG KE IN PK CN HK JP KR SG TH ID PH AU NZ BR AR CL MX CO".split()

def phones(r, national):
    while True:
        region = r.choice(REGIONS)
        number = phonenumbers.example_number_for_type(region, r.choice([Type.MOBILE, Type.FIXED_LINE]))
        digits = str(number.national_number)
        number.national_number = int(digits[:-5] + drawn(r, DIGITS, 5))
        if phonenumbers.is_valid_number(number): break
    text = phonenumbers.format_number(number, Format.NATIONAL if national else r.choice([Format.INTERNATIONAL]*3 + [Format.E164]))
    if not national:
        text = r.choice([text, text, text.replace(" ", "-"), text.replace(" ", "."), text.replace("+", "00"), text.replace(" ", "\u00a0")]) if " " in text else text
    elif r.random() < 0.25: text = "".join(c for c in text if c in DIGITS)
    return text

def us_phones(r):
    while True:
        area,rest,last = r.choice(["212", "415", "617", "312", "206", "305"]), drawn(r, "23456789", 1) + drawn(r, DIGITS, 2), drawn(r, DIGITS, 4)
        if phonenumbers.is_valid_number(phonenumbers.parse(f"+1{area}{rest}{last}")): break
    return r.choice([f"({area}) {rest}-{last}", f"{area}-{rest}-{last}", f"{area}.{rest}.{last}", f"1-{area}-{rest}-{last}", f"+1 ({area}) {rest}-{last}", f"{area}-{rest}-{last} ext. {r.randrange(10, 999)}"])

def checked_luhn(digits): return digits + luhn.calc_check_digit(digits)

def cards(r):
    kind = r.randrange(6)
    if kind == 0: n,groups = checked_luhn(r.choice(["34", "37"]) + drawn(r, DIGITS, 12)), (4, 6, 5)
    elif kind == 1: n,groups = checked_luhn(r.choice(["51", "52", "55", "2221", "2720"]) .ljust(4, "0") + drawn(r, DIGITS, 11)), (4, 4, 4, 4)
    elif kind == 2: n,groups = checked_luhn(r.choice(["6011", "6440", "6500", "3528", "6200"]) + drawn(r, DIGITS, 11)), (4, 4, 4, 4)
    elif kind == 3: n,groups = checked_luhn("36" + drawn(r, DIGITS, 11)), (4, 6, 4)
    else: n,groups = checked_luhn("4" + drawn(r, DIGITS, 14)), (4, 4, 4, 4)
    parts,at = [],0
    for g in groups: parts.append(n[at:at + g]); at += g
    return r.choice(["", " ", " ", "-"]).join(parts)

BBAN = {"DE": "d18", "GB": "u4d14", "FR": "d10a11d2", "ES": None, "NL": "u4d10", "IT": None, "PL": None, "CH": "d5a12", "AT": "d16", "BE": None, "SE": None, "NO": None, "DK": "d14",
        "PT": None, "IE": "u4d14", "SA": "d2a18", "AE": "d19", "TR": "d5d1a16", "MT": "u4d5a18", "LU": "d3a13", "GR": "d7a16", "RO": "u4a16", "CY": "d8a16"}

def ibans(r): # countries whose own account numbers have no second check digit inside
    country = r.choice([c for c,b in BBAN.items() if b])
    body,pattern = "", BBAN[country]
    import re
    for letter,n in re.findall(r"([dua])(\d+)", pattern): body += drawn(r, {"d": DIGITS, "u": UPPER, "a": DIGITS}[letter], int(n))
    as_number = int("".join(str(int(c, 36)) for c in body + country + "00"))
    whole = f"{country}{98 - as_number % 97:02d}{body}"
    return whole if r.random() < 0.5 else " ".join(whole[i:i + 4] for i in range(0, len(whole), 4))

def ips(r):
    if r.random() < 0.3:
        groups = [r.choice(["2001", "2a02", "2606", "fe80", "fd12"])] + [f"{r.randrange(1, 65536):x}" for _ in range(7)]
        if r.random() < 0.6: groups[3:6] = [""]
        return ":".join(groups)
    return ".".join(str(o) for o in (r.choice([10, 192, 172, 8, 81, 93, 145, 203]), r.randrange(256), r.randrange(256), r.randrange(1, 255)))

def day(r): return r.randrange(1, 29), r.randrange(1, 13), r.randrange(1950, 2005)
def until(valid, make):
    while not valid(value := make()): pass
    return value

def nationals(r): # (value, the name that a form gives it)
    d,m,y = day(r)
    n = lambda k: drawn(r, DIGITS, k)
    grouped = lambda digits, *sizes, sep=" ": sep.join(digits[sum(sizes[:i]):sum(sizes[:i + 1])] for i in range(len(sizes)))
    kind = r.randrange(24)
    if kind in (0, 1): value = f"{r.randrange(1, 665):03d}-{r.randrange(1, 99):02d}-{r.randrange(1, 9999):04d}"; return r.choice([value, value, value.replace("-", "")]), r.choice(["SSN", "social_security_number"])
    if kind == 2: return grouped(checked_luhn(r.choice("1245679") + n(7)), 3, 3, 3, sep=r.choice(["-", " "])), r.choice(["SIN", "social_insurance_number"])
    if kind == 3:
        from stdnum.gb import nhs
        value = until(nhs.is_valid, lambda: r.choice("4679") + n(9)); return r.choice([value, grouped(value, 3, 3, 4)]), "NHS number"
    if kind == 4: return r.choice([v := drawn(r, "ACEHJLMPRSTW", 1) + drawn(r, "ABCEHJKLMPRSTWXYZ", 1) + n(6) + r.choice("ABCD"), f"{v[:2]} {v[2:4]} {v[4:6]} {v[6:8]} {v[8]}"]), "National Insurance number"
    if kind == 5: value = until(idnr.is_valid, lambda: r.choice("123456789") + n(10)); return r.choice([value, grouped(value, 2, 3, 3, 3)]), "Steuer-ID"
    if kind == 6: v = f"{r.choice('12')}{y % 100:02d}{m:02d}{r.randrange(1, 95):02d}{r.randrange(1, 990):03d}{r.randrange(1, 999):03d}"; v += nir.calc_check_digits(v); return r.choice([v, grouped(v, 1, 2, 2, 2, 3, 3, 2)]), "numéro de sécurité sociale"
    if kind == 7: v = n(8); return r.choice([v, v + "-" if r.random() < .2 else v]) + dni.calc_check_digit(v), "DNI"
    if kind == 8: v = r.choice("XYZ") + n(7); return v + nie.calc_check_digit(v), "NIE"
    if kind == 9: v = drawn(r, "BCDFGLMNPRST", 3) + drawn(r, "BCDFGLMNPRST", 3) + f"{y % 100:02d}{'ABCDEHLMPRST'[m - 1]}{d + 40 * r.randrange(2):02d}" + r.choice("AFGHL") + n(3); return v + codicefiscale.calc_check_digit(v), "codice fiscale"
    if kind in (10, 11): v = n(9); v += cpf._calc_check_digits(v); return r.choice([v, f"{v[:3]}.{v[3:6]}.{v[6:9]}-{v[9:]}"]), "CPF"
    if kind == 12: v = until(lambda v: v != v[::-1], lambda: r.choice("23456789") + n(10)); v += verhoeff.calc_check_digit(v); return r.choice([v, grouped(v, 4, 4, 4)]), "Aadhaar"
    if kind == 13: return drawn(r, UPPER, 3) + r.choice("ACFHP") + drawn(r, UPPER, 1) + f"{r.randrange(1, 9999):04d}" + r.choice(UPPER), "PAN"
    if kind == 14:
        from stdnum.nl import bsn
        return until(bsn.is_valid, lambda: r.choice("123456789") + n(8)), "BSN"
    if kind == 15: v = f"{y % 100:02d}{m + 20 * (y >= 2000):02d}{d:02d}{n(4)}"; return v + pesel.calc_check_digit(v), "PESEL"
    if kind == 16: v = f"{y % 100:02d}{m:02d}{d:02d}{n(3)}"; v = checked_luhn(v); return r.choice([f"{v[:6]}-{v[6:]}", f"{y // 100}{v[:6]}-{v[6:]}"]), "personnummer"
    if kind == 17: v = until(fodselsnummer.is_valid, lambda: f"{d:02d}{m:02d}{y % 100:02d}{n(5)}"); return r.choice([v, f"{v[:6]} {v[6:]}"]), "fødselsnummer"
    if kind == 18: v = f"{d:02d}{m:02d}{y % 100:02d}{r.randrange(2, 899):03d}"; return f"{v[:6]}-{v[6:]}{hetu._calc_checksum(v)}" if y < 2000 else f"{v[:6]}A{v[6:]}{hetu._calc_checksum(v)}", "henkilötunnus"
    if kind == 19: v = "756" + n(9); from stdnum import ean; v += ean.calc_check_digit(v); return f"{v[:3]}.{v[3:7]}.{v[7:11]}.{v[11:]}", "AHV-Nummer"
    if kind == 20: v = until(rc.is_valid, lambda: f"{r.randrange(54, 99)}{m + 50 * r.randrange(2):02d}{d:02d}{n(4)}"); return f"{v[:6]}/{v[6:]}", "rodné číslo"
    if kind == 21: v = until(tckimlik.is_valid, lambda: (b := r.choice("123456789") + n(8)) + tckimlik.calc_check_digits(b)); return v, "T.C. kimlik no"
    if kind == 22: v = drawn(r, "BCDFGH", 1) + r.choice("AEIOU") + drawn(r, "LMNPRS", 2) + f"{y % 100:02d}{m:02d}{d:02d}" + r.choice("HM") + r.choice(["DF", "JC", "NL", "MC"]) + drawn(r, "BCDFGLMNPRST", 3) + n(1); return until(curp.is_valid, lambda: v[:-1] + n(1) + n(1)), "CURP"
    return f"{d:02d}{m:02d}{y % 100:02d}-{r.choice('0123' if y < 2000 else '456')}{n(3)}", "CPR-nummer"

def secrets(r): # (text around it, the secret in it, at `{}`)
    rand = lambda n, letters=ALNUM: drawn(r, letters, n - 3) + drawn(r, DIGITS, 1) + drawn(r, "QWERTZ", 1) + drawn(r, "abcdef", 1) if letters is ALNUM else drawn(r, letters, n)
    # prefixes in two pieces, so that no text of this file looks like a key
    keys = ["s" "k-" + rand(48), "s" "k-proj-" + rand(60), "s" "k-ant-api03-" + rand(80), "s" "k_live_" + rand(24), "h" "f_" + rand(34), "gh" "p_" + rand(36), "github" "_pat_" + rand(22) + "_" + rand(59),
            "gl" "pat-" + rand(20), "AK" "IA" + drawn(r, UPPER + "234567", 15) + "7", "AI" "za" + rand(35), "xo" "xb-" + drawn(r, DIGITS, 12) + "-" + rand(24), "np" "m_" + rand(36), "py" "pi-AgEIcHlwaS5vcmc" + rand(80),
            "S" "G." + rand(22) + "." + rand(43), "dop" "_v1_" + drawn(r, HEX, 64), "da" "pi" + drawn(r, HEX, 32), "shp" "at_" + drawn(r, HEX, 32), "hv" "s." + rand(90), "gs" "k_" + rand(52),
            "ey" "JhbGciOiJIUzI1NiJ9.ey" "J" + rand(60) + "." + rand(43)]
    password = r.choice([lambda: "".join(r.sample(LOWER, 5)) + drawn(r, UPPER, 2) + drawn(r, DIGITS, 3) + r.choice("!#%+*"),
                         lambda: r.choice(["Summer", "hunter", "Dragon", "Monkey"]) + drawn(r, DIGITS, 4) + r.choice(["!", "", "#"]), lambda: rand(16), lambda: rand(24) + "=="])()
    url_password = password.replace("#", "x").replace("%", "x").replace("/", "x")
    block = "-----BEGIN {0}PRIVATE KEY-----\n{1}\n-----END {0}PRIVATE KEY-----".format(r.choice(["", "RSA ", "EC ", "OPENSSH "]), "\n".join(rand(64) for _ in range(6)))
    return r.choice([("{}", r.choice(keys))]*10 + [
        ('password = "{}"', password), ("DB_PASSWORD={}", password), ("password: {}", password), ('"password": "{}"', password), ("PGPASSWORD='{}' psql -h db", password), ("my password is {}", password),
        ('api_key="{}"', rand(32)), ("X-Api-Key: {}", drawn(r, HEX, 32)), ("https://api.acme.io/v1/items?api_key={}&page=2", drawn(r, HEX, 32)), ('client_secret: "{}"', rand(40)), ('self.secret_key = "{}"', rand(50)),
        ('os.environ["AUTH_TOKEN"] = "{}"', drawn(r, HEX, 40)), ("AWS_SECRET_ACCESS_KEY={}", rand(40)), ("AccountKey={};EndpointSuffix=core", rand(86) + "=="),
        ("Authorization: Bearer {}", rand(40)), ("mysql --user=root --password={} shop", password),
        ("postgres://{}@db.acme.io:5432/shop", f"app:{url_password}"), ("https://{}@git.acme.io/repo.git", f"bot:{url_password}"), ("{}", block)])

SENTENCES = {
    "email": ["You can reach me at {}.", "Please forward the invoice to {}, thanks!", "<{}> wrote on Monday:", "Kontakt: {}", "Is {} still your address?", "mailto:{}"],
    "phone": ["Call me on {} after six.", "My phone number is {}.", "Tel. {}", "Mobile: {} (evenings)", "Rufen Sie uns an: Telefon {}.", "Téléphone : {}", "Mi móvil es el {}", "fax {}", "WhatsApp {} please"],
    "card": ["I paid with card {} yesterday.", "Card number {}, expires 12/27.", "Charge it to {} please.", "My Visa is {}."],
    "iban": ["Bitte überweisen Sie auf {}.", "My IBAN is {} at the savings bank.", "Refund to {}, please.", "IBAN: {}"],
    "ip": ["The request came from {}.", "Blocked {} after five attempts.", "ssh root@{} failed", "Client IP {} again", "http://{}/admin", "connect to {}:8080"],
    "national_number": ["My {key} is {}.", "{key}: {}", "Please update {key} {} in your records.", "Her {key} ({}) was wrong on the form."],
}
KEYS = {"email": "contact_email", "phone": "phone", "card": "card_number", "iban": "iban", "ip": "remote_addr"}

def embed(r, kind, value, form, key=None):
    "The text with the value in it, and its place."
    key = key or KEYS.get(kind, kind)
    field = key.lower().replace(" ", "_").replace("-", "_").replace(".", "")
    name,amount = r.choice(FIRST), r.randrange(10, 999)
    if form == "sentence": before,after = r.choice(SENTENCES[kind]).replace("{key}", key).split("{}")
    elif form == "json": before,after = json.dumps({"id": amount, "name": name, field: "~~", "active": True}, ensure_ascii=False).split("~~")
    elif form == "csv": before,after = f"{amount},{name},", f",2024-0{r.randrange(1, 9)}-1{r.randrange(9)},{amount}.50,open"
    elif form == "header": before,after = f"id,name,{field},since\n{amount},{name},", ",2024-03-01"
    elif form == "code": before,after = f"user = User({amount})\nuser.{field} = \"", "\"\nuser.save()"
    else: before,after = f"2024-03-01 12:00:{r.randrange(10, 60)} INFO [worker-{amount}] {field}={'' if form == 'log' else ''}", " status=200"
    if kind == "ip" and ":" in value: before,after = before.replace("http://", "http://["), after.replace("/admin", "]/admin").replace(":8080", " port 8080")
    return Planted(before + value + after, [(kind, len(before), len(before) + len(value))], form)

FORMS = ["sentence", "sentence", "sentence", "json", "csv", "header", "code", "log"]

def planted(seed=0, each=120):
    "At least `each` texts with one planted value of every kind, and blocks with several."
    r,texts = random.Random(seed), []
    for i in range(each):
        form = FORMS[i % len(FORMS)]
        for kind,make in (("email", emails), ("card", cards), ("iban", ibans), ("ip", ips)): texts.append(embed(r, kind, make(r), form))
        texts.append(embed(r, "phone", phones(r, national=False), form))
        texts.append(embed(r, "phone", us_phones(r), form))
        if form not in ("csv",): texts.append(embed(r, "phone", phones(r, national=True), form))
        for _ in range(2): value,key = nationals(r); texts.append(embed(r, "national_number", value, form, key))
        around,value = secrets(r)
        before,after = around.split("{}")
        lead = r.choice(["", "Set this first:\n", "export ", "# from the old server\n", "The log says "])
        texts.append(Planted(lead + before + value + after, [("secret", len(lead + before), len(lead + before + value))], "secret"))
        if i % 6 == 0: texts.append(block(r))
    return texts

def block(r):
    "A signature with several values."
    text,spans = f"Best regards\n{r.choice(FIRST).title()} {r.choice(LAST).title()}\n12 High Street\n", []
    for label,kind,value in (("Tel. ", "phone", us_phones(r)), ("Mail: ", "email", emails(r)), ("IBAN ", "iban", ibans(r)), ("Server ", "ip", ips(r))):
        text += label; spans.append((kind, len(text), len(text) + len(value))); text += value + "\n"
    return Planted(text, spans, "block")

def clean(seed=0, each=25):
    "Look-alikes without personal data."
    r,texts = random.Random(seed), []
    n = lambda k: drawn(r, DIGITS, k)
    wrong = lambda digits: digits[:-1] + str((int(digits[-1]) + r.randrange(1, 10)) % 10)
    for _ in range(each):
        date = f"20{r.randrange(10, 26)}-{r.randrange(1, 13):02d}-{r.randrange(1, 29):02d}"
        isbn = f"978-{r.randrange(10)}-{n(3)}-{n(5)}-{r.randrange(10)}"
        iban = ibans(r)
        bad_iban = iban[:2] + f"{(int(iban[2:4]) + r.randrange(1, 90)) % 97:02d}" + iban[4:]
        hashed = lambda algorithm: algorithm(n(9).encode()).hexdigest()
        for look,text in [
            ("order", f"Your order {n(3)}-{n(7)}-{n(7)} from {date} has shipped."), ("order", f"Order no. {n(10)} and invoice {r.randrange(2010, 2026)}-{n(6)} are paid."), ("order", f"ticket #{n(8)}, case {n(3)}-{n(3)}-{n(4)}"),
            ("tracking", f"Parcel 1Z{drawn(r, UPPER + DIGITS, 6)}{n(10)}, tracking number {n(12)}."), ("ean", f"EAN {n(13)}, article 0{n(4)}-{n(5)}"),
            ("version", f"Upgraded from version {r.randrange(9)}.{r.randrange(20)}.{r.randrange(20)}.{r.randrange(20)} to v{r.randrange(9)}.{r.randrange(20)}.{r.randrange(20)}.{r.randrange(9)}"),
            ("version", f"numpy=={r.randrange(3)}.{r.randrange(30)}.{r.randrange(9)}.{r.randrange(9)}\ntorch>={r.randrange(3)}.{r.randrange(30)}.0.1\nchromium/{r.randrange(90, 140)}.0.{n(4)}.{r.randrange(200)}"), ("version", f"See section {r.randrange(9)}.{r.randrange(9)}.{r.randrange(9)}.{r.randrange(9)} of the manual."),
            ("hash", f"commit {hashed(sha1)}\nsha256:{hashed(sha256)}"), ("hash", f"Fixed in {hashed(sha1)[:8]} and {hashed(sha1)[:12]}, digest = \"{hashed(sha256)}\""), ("uuid", f"request {uuid.UUID(int=r.getrandbits(128))} took {n(3)} ms, trace {uuid.UUID(int=r.getrandbits(128)).hex}"),
            ("date", f"From {date} 10:{r.randrange(10, 60)} to {r.randrange(1, 29):02d}.{r.randrange(1, 13):02d}.2024 at 12:{r.randrange(10, 60)}:{r.randrange(10, 60)}; due {r.randrange(1, 13):02d}/{r.randrange(1, 29):02d}/2025"), ("date", f"{{\"created\": {r.randrange(1_500_000_000, 1_800_000_000)}, \"updated\": {r.randrange(1_500_000_000_000, 1_800_000_000_000)}}}"), ("date", f"backup-{date.replace('-', '')}{n(6)}.tar.gz, 20240301T1012{r.randrange(10, 60)}Z"),
            ("isbn", f"ISBN {isbn}, also 0-{n(3)}-{n(5)}-X; ISSN {n(4)}-{n(4)}"), ("isbn", f"doi:10.{n(4)}/{n(7)}.{n(7)}"),
            ("price", f"Total ${r.randrange(1, 99)},{n(3)}.{n(2)}, EUR {r.randrange(1, 9)}.{n(3)}.{n(3)},00, {r.randrange(1, 999)} {n(3)} {n(3)} inhabitants, population {r.randrange(1, 9)},{n(3)},{n(3)}"), ("number", f"lat {r.randrange(90)}.{n(6)}, lon -{r.randrange(90)}.{n(6)}; pi is 3.14159265358979, loss 0.{n(9)}"),
            ("number", "\n".join(" ".join(f"{r.randrange(100):02d}" for _ in range(8)) for _ in range(3))), ("number", f"[{', '.join(n(5) for _ in range(6))}]"), ("number", f"0x{drawn(r, HEX, 16)} {n(4)} {n(4)} {n(2)}"), ("hex dump", " ".join(drawn(r, HEX, 2) for _ in range(16))),
            ("card", f"reference {wrong(checked_luhn('4' + n(14)))}"), ("card", f"{wrong(checked_luhn('51' + n(13)))[:4]} {n(4)} {n(3)}"), ("card", f"IMEI {checked_luhn('356' + n(11))}, serial {checked_luhn('9' + n(14))}"), ("iban", f"account {bad_iban}"), ("iban", f"part DE{n(2)} {drawn(r, UPPER, 4)} and FR{n(2)}"),
            ("national", f"part number {n(4)}-{n(2)}-{n(4)}, 000-{n(2)}-{n(4)}, model {r.choice('BFGIOU')}{drawn(r, UPPER, 1)}{n(6)}E"), ("national", f"lot {n(8)}{'ABCDEFGHJ'[r.randrange(9)]}-{n(2)}, batch {wrong(until(pesel.is_valid, lambda: n(11)))}"), ("phone", f"serial 555-{n(2)}-{n(6)}, ext 12, room 0{n(2)}"), ("phone", f"RFC {n(4)}, line {n(4)}-{n(4)}, pages {n(3)}-{n(3)}, rows 100-200-300"),
            ("mac", f"eth0 {':'.join(drawn(r, HEX, 2) for _ in range(6))} mtu 1500, 12:34:56.{n(6)}"), ("ip", "listening on 127.0.0.1:8000 and 0.0.0.0, mask 255.255.255.0, ::1"), ("ip", f"x[::2], y[1::3], std::vector<a::b>, {n(3)}.{n(3)}.{n(3)}.999, 1.2.3, 1.2.3.4.5"),
            ("at", f"@dataclass\nclass A: pass\nw = x @ y.T + q@k.transpose(-2, -1); icon@2x.png; react@17.0.{r.randrange(9)}; thanks @{r.choice(FIRST)}"), ("at", "meet me @ the station. getty@tty1.service; user@localhost; a@b"),
            ("password", "password = os.environ[\"DB_PASSWORD\"]\ntoken = tokenizer.encode(text)[0]\napi_key = config.api_key"), ("password", "Password must be at least 8 characters and contain 1 digit. Your password: ********"), ("password", "api_key=\"YOUR_API_KEY_1\", password=\"<PASSWORD_1>\", secret = \"${SECRET_2}\", token: {{ token_1 }}"), ("password", "def check(password: str, token: Optional[str] = None) -> bool2: return password == expected_password1"), ("password", "postgres://user:password@localhost/db https://$USER:${TOKEN1}@host"), ("password", "max_tokens=4096 pad_token=\"<|pad_0|>\" token_type_ids=tokens1 next_token = token2"),
            ("key", f"sk-learn-contrib-example-v1-0-2, risk-free-rate-for-2024-and-2025, integrity sha512-{drawn(r, ALNUM, 86)}=="), ("key", f"<img src=\"data:image/png;base64,iVBORw0KGgo{drawn(r, ALNUM, 80)}\">"), ("key", f"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5{drawn(r, ALNUM, 48)} laptop"), ("key", f"-----BEGIN CERTIFICATE-----\n{drawn(r, ALNUM, 64)}\n-----END CERTIFICATE-----"), ("key", f"job_id=run-{n(8)}-{drawn(r, HEX, 4)} cache_key={r.choice(FIRST)}_{n(4)} primary key id{n(3)} keyboard123"),
        ]: texts.append(Planted(text, [], look))
    return texts

BY_HAND = """
Hi, it's Marta. My new mobile is [phone +48 601 234 567], the old one ([phone 601 23 45]) is dead.
ring Dave on [phone 07911 123456] or at work [phone 0161 496 0753]
Tel.: [phone +49 (0)89 / 636-48018], Fax: [phone 089/636-48019]
Tél. : [phone 01 42 68 53 00] - Port. : [phone 06.12.34.56.78]
telefono [phone 02 1234 5678] oppure cellulare [phone 347 123 4567]
Móvil: [phone 612 34 56 78] / Fijo: [phone 91 123 45 67]
celular [phone (11) 98765-4321], whatsapp [phone +55 21 99876-5432]
Call us toll free at [phone 1-800-356-9377] or text [phone +1 415-736-0000].
mobile no [phone 98765 43210], landline [phone 022 2778 3456]
my cell: [phone 4157360000]; home [phone (617)253-1000] was cut off
phone number: [phone 0044 20 7946 0958]
{"name":"Li","tel":"[phone 138 0013 8000]","email":"[email li.wei88@163.com]"}
sip:[email alice@voip.acme.net] or tel:[phone +1-201-736-0123]
From: "O'Hara, Tim" <[email tim.ohara@bigco.com]>; cc [email t_o@bigco.co.uk],[email legal@bigco.com]
Email me (\u2018[email jo.doe+spam@gmail.com]\u2019)!
user=[email root.admin@mail.internal]&next=/home
I wired it to [iban GB82 WEST 1234 5698 7654 32] and [iban FR1420041010050500013M02606].
IBAN:[iban DE75512108001245126199], BIC SOLADEST600
[iban NL91 ABNA 0417 1643 00] t.n.v. J. de Vries
Card: [card 5500 0000 0000 0004] exp 09/27 cvv 123
amex [card 3782 822463 10005], visa [card 4012888888881881], mc [card 5105-1051-0510-5100]
{"pan": "[card 6011000990139424]", "exp": "1226"}
client [ip 203.0.113.77] -> [ip 10.20.30.40]:443, x-forwarded-for: [ip 2001:db8:85a3::8a2e:370:7334], [ip 198.51.100.23]
ping [ip 8.8.8.8] works, traceroute to [ip 93.184.216.34] does not.
Nginx 1.25.3.1 behind [ip 192.168.178.20]; kernel version 5.15.0.91
SSN: [national_number 536-90-4399]. DOB 1980-02-03.
my social is [national_number 219-09-8188], why?
NI number QQ 12 34 56 C is a specimen, [national_number AB 12 34 56 C] is not
NHS No: [national_number 943 476 5919]
DNI [national_number 12345678Z], NIE [national_number X1234567L]
C.F. [national_number RSSMRA85T10A562S]
CPF: [national_number 390.533.447-05]
PESEL [national_number 44051401359]
Steuerliche Identifikationsnummer: [national_number 36 574 261 809]
N\u00b0 s\u00e9cu : [national_number 2 55 08 14 168 025 38]
personnummer [national_number 811228-9874]
BSN: [national_number 111222333]
Aadhaar No. [national_number 2341 2341 2346]
f\u00f8dselsnummer [national_number 15108695088]
AHV-Nr. [national_number 756.9217.0769.85]
RUT [national_number 12.531.909-2]
HETU [national_number 131052-308T]
export DATABASE_URL=mysql://[secret svc_app:T0p-Secret!]@[ip 10.0.0.5]/shop
spring.datasource.password=[secret Wint3r2023#]
curl -H "Authorization: Basic [secret YWRtaW46c3VwZXJzM2NyZXQ=]" https://x.io
the wifi password is [secret blue-Horse-42!]
"db_password" => "[secret kX9#mP2$vL5q]",
const apiKey = "[secret 9f86d081884c7d659a2feaa0c55ad015]";
sshpass -p hello ssh root@host
REDIS_PASSWORD: "[secret n0tAn0therP4ss]"
"""

def by_hand():
    "Lines as people write them, with `[kind value]` around what is private."
    import re
    texts = []
    for line in BY_HAND.strip().splitlines():
        text,spans,at = "", [], 0
        for m in re.finditer(r"\[(email|phone|card|iban|ip|national_number|secret) (.*?)\](?!\w)", line):
            text += line[at:m.start()]
            spans.append((m[1], len(text), len(text) + len(m[2])))
            text,at = text + m[2], m.end()
        texts.append(Planted(text + line[at:], spans, "by hand"))
    return texts
