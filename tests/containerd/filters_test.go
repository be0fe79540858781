package containerd

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/filters"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
)

// adaptor shows a snapshot to containerd's filters, with the fields that containerd gives it.
func adaptor(info snapshots.Info) filters.Adaptor {
	return filters.AdapterFunc(func(path []string) (string, bool) {
		switch path[0] {
		case "kind":
			return strings.ToLower(info.Kind.String()), true
		case "name":
			return info.Name, true
		case "parent":
			return info.Parent, true
		case "labels":
			value, present := info.Labels[strings.Join(path[1:], ".")]
			return value, present
		}
		return "", false
	})
}

const refLabel = "containerd.io/snapshot.ref"

// The snapshots that filters are tried on; parents come before those that name them.
var population = []struct {
	kind         snapshots.Kind
	name, parent string
	labels       map[string]string
}{
	{snapshots.KindCommitted, "base", "", map[string]string{"a": "1", "foo.bar": "baz"}},
	{snapshots.KindCommitted, "default/3/two words", "base", map[string]string{"a": "2", refLabel: "sha256:abc"}},
	{snapshots.KindCommitted, "x", "", map[string]string{refLabel: "sha256:abc", "": "no name"}},
	{snapshots.KindActive, `quo"te\d`, "base", map[string]string{"a": `say "hi"`, "b": `back\slash`, refLabel: "sha256:abc"}},
	{snapshots.KindActive, "日本/é", "default/3/two words", map[string]string{"日本": "é", "a": "e\u0301", "b": "٣ ſ K"}},
	{snapshots.KindActive, "a,b==c", "", map[string]string{"a": "x,y", "b": "a.b", "c": "a/b|c", "with space": "v"}},
	{snapshots.KindView, "line\nbreak", "x", map[string]string{"a": "line\nbreak", "b": "tab\there", "c": "\x01\x7f"}},
	{snapshots.KindView, "\ufffd", "base", map[string]string{"a": "\ufffd", "b": "\u00a0\u0085", "\ufffd": "1", `q"l`: "1"}},
	{snapshots.KindView, "A", "", map[string]string{"a": "x{2}", "b": "[a&&b]", "c": "a{,2}<>", "A": "ÿ\u00ad\u0378\U000e0100"}},
	{snapshots.KindActive, "plain", "", nil},
}

func populate(ctx context.Context, sn snapshots.Snapshotter) error {
	for _, p := range population {
		var err error
		labels := snapshots.WithLabels(p.labels)
		switch p.kind {
		case snapshots.KindCommitted:
			if _, err = sn.Prepare(ctx, "prepared", p.parent); err == nil {
				err = sn.Commit(ctx, p.name, "prepared", labels)
			}
		case snapshots.KindView:
			_, err = sn.View(ctx, p.name, p.parent, labels)
		default:
			_, err = sn.Prepare(ctx, p.name, p.parent, labels)
		}
		if err != nil {
			return fmt.Errorf("%q: %w", p.name, err)
		}
	}
	return nil
}

// comparison asks the daemon and containerd's own code the same.
type comparison struct {
	daemon snapshots.Snapshotter
	infos  []snapshots.Info
	// How often both agreed on an error, on no snapshot, on some and on all.
	refused, none, some, all int
}

// differs says how the answers differ, "" if they do not.
func (c *comparison) differs(ctx context.Context, texts ...string) string {
	var expected, actual []string
	filter, parseError := filters.ParseAll(texts...)
	if parseError == nil {
		for _, info := range c.infos {
			if filter.Match(adaptor(info)) {
				expected = append(expected, info.Name)
			}
		}
	}
	err := c.daemon.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		actual = append(actual, info.Name)
		return nil
	}, texts...)
	slices.Sort(actual)
	switch {
	case parseError != nil && errdefs.IsInvalidArgument(err):
		c.refused++
	case parseError != nil && err == nil:
		return fmt.Sprintf("containerd refuses it (%v), the daemon finds %q", parseError, actual)
	case err != nil:
		return fmt.Sprintf("containerd finds %q (%v), the daemon answers %v", expected, parseError, err)
	case !slices.Equal(expected, actual):
		return fmt.Sprintf("containerd finds %q, the daemon %q", expected, actual)
	case len(actual) == 0:
		c.none++
	case len(actual) == len(c.infos):
		c.all++
	default:
		c.some++
	}
	return ""
}

func TestFiltersAgree(t *testing.T) {
	ctx := t.Context()
	d, err := startDaemon(t, filepath.Join(t.TempDir(), "root"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := d.stop(); err != nil {
			t.Error(err)
		}
	}()
	if err := populate(ctx, d); err != nil {
		t.Fatal(err)
	}
	c := comparison{daemon: d}
	if err := d.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		c.infos = append(c.infos, info)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if len(c.infos) != len(population) {
		t.Fatalf("%d of %d snapshots are there", len(c.infos), len(population))
	}
	slices.SortFunc(c.infos, func(a, b snapshots.Info) int { return strings.Compare(a.Name, b.Name) })
	// containerd's code complains of each wrong regular expression.
	complaints := log.L.Logger.Out
	log.L.Logger.SetOutput(io.Discard)
	defer log.L.Logger.SetOutput(complaints)

	t.Run("Table", func(t *testing.T) {
		if difference := c.differs(ctx); difference != "" {
			t.Errorf("no filter: %s", difference)
		}
		for _, text := range table {
			if difference := c.differs(ctx, text); difference != "" {
				t.Errorf("%.80q: %s", text, difference)
			}
			if difference := c.differs(ctx, "name==x", text); difference != "" {
				t.Errorf("name==x or %.80q: %s", text, difference)
			}
		}
	})
	t.Run("OtherDialect", func(t *testing.T) {
		for _, text := range otherDialect {
			if _, err := filters.Parse(text); err != nil {
				t.Errorf("%.80q: %v", text, err)
			}
			err := d.Walk(ctx, func(context.Context, snapshots.Info) error { return nil }, text)
			if err != nil {
				t.Errorf("%.80q: %v", text, err)
			}
			// So that the list says no more than what is true.
			if c.differs(ctx, text) == "" {
				t.Errorf("%.80q: both agree; it belongs into the table", text)
			}
		}
	})
	t.Run("Random", func(t *testing.T) {
		const seed, rounds = 20240229, 6000
		c.refused, c.none, c.some, c.all = 0, 0, 0, 0
		g := generator{rand.New(rand.NewPCG(seed, 0))}
		for range rounds {
			texts := make([]string, 1+g.IntN(4)/3)
			for i := range texts {
				texts[i] = g.filter()
			}
			if difference := c.differs(ctx, texts...); difference != "" {
				t.Errorf("%q: %s", texts, difference)
			}
		}
		t.Logf("agreed: refused %d, found none %d, some %d, all %d", c.refused, c.none, c.some, c.all)
		// A generator that only makes nonsense would compare nothing.
		if !t.Failed() && min(c.refused, c.none, c.some, c.all) < rounds/20 {
			t.Errorf("the random filters are one-sided")
		}
	})
}

var table = []string{
	// Whole filters, and fields.
	"", "name", "kind", "parent", "labels", "labels.a", "labels.nothing", "labels.foo.bar", "unknown", "Name",
	"name.more", "kind.more==active", "parent.x.y", "labels.a.b", `labels."foo.bar"`, `labels."foo"."bar"`,
	`labels.""`, `labels.""=="no name"`, `"name"==x`, `"labels".a==1`, `labels.日本`, `labels."日本"==é`,
	`labels."with space"`, `labels."q\"l"`, `labels."\u65e5\u672c"`, `labels."\xe6\x97\xa5本"`,
	"labels./a/", "labels.|a|", "/name/==x", "_", "0", "labels.0", "name_==x", "na-me==x", "-name", "名==x",

	// Operators.
	"kind==active", "kind!=active", "kind~=^a", "kind==Active", "kind==view", "kind==committed", "unknown!=x",
	`unknown==""`, `unknown~="^$"`, "labels.nothing!=1", `labels.nothing==""`, `labels.nothing!=""`,
	"labels.nothing~=x*", `parent==""`, `parent!=""`, "parent==base", "parent~=.", `parent~="."`,
	"name=x", "name===x", "name!x", "name!", "name~x", "name=~x", "name~==x", "name!==x", "name!!=x", "name==", "name!=",
	"name~=", "name== ", "name==,", "name==.", "name==.x", "==", "==x", "name==x==y", "name===", "name==!x", "name==-x",
	"name===x,", "name= =x",

	// Separators and white space.
	",", ".", ",,", "name,", ",name", "name,,kind", "name.", ".name", "name..x", "name==x,", "name==x,,", "name==x.",
	"name==x,kind", "name==x,kind==committed", "name==x,kind==active", "name==x;kind", " ", "\t", "\n", " name", "name ",
	"name\n", " name==x", "name==x ", "name ==x", "name== x", "name == x", "name == x,kind", "name==x, kind",
	"name==x ,kind", "labels .a", "labels. a", "labels.\na", "name\u00a0==\u00a0x", "name\u0085==\u2003x", "name==\u3000x",
	"name\u200b==x", "name==x\u200b", "name==x\u2028", "name==x\u00a0", "name==x y", "name==x\vy", "kind == active , name",
	"name==default/3/two words", `name=="default/3/two words"`, "name==a,b==c", `name=="a,b==c"`,

	// Unquoted values.
	"labels.b==a.b", "labels.c==a/b|c", "labels.a==x{2}", "labels.b==[a&&b]", `labels.a==say"hi"`, `name==x"`, "name==x'",
	"name=='x'", "name==`x`", `name=="x`, `name==x\`, "name==日本/é", "labels.a==e\u0301", "labels.a==\u0301",
	"name==\ufffd", "name!=\ufffd", "name==x\ufffd", "\ufffd==x", "name==\x00", "name\x00", "name==x\x00y", "\x00",
	"name==\x01", "name==\x01\x7f", "name==\x7f", "name==x\x01", "labels.c!=\x01",
	// Which characters a value may hold is a matter of their Unicode class.
	"name!=\u00ad", "name!=x\u00ad", "name!=x\u0378", "name!=\u0378", "name!=x\u061c", "name!=x\u0890", "name!=x\u08e2",
	"name!=x\u180e", "name!=x\u2065", "name!=x\ufe0f", "name!=x\ufeff", "name!=x\ue000", "name!=x\uffff", "name!=x\U000110bd",
	"name!=x\U00013430", "name!=x\U0001bca0", "name!=x\U0001d173", "name!=x\U0001f600", "name!=x\U00020000",
	"name!=x\U000e0001", "name!=x\U000e0100", "name!=x\U000f0000", "name!=x\U0010ffff",

	// Quoted values.
	`name==""`, `name!=""`, `name=="x"`, `name=="x"y`, `name=="x""y"`, `name=="x",kind`, `name=="x" `, `name=="x".y`,
	`name=="`, `name=="\"`, `name=="x\`, "name==\"a\nb\"", `name=="line\nbreak"`, "name==\"a\rb\"", "name==\"a\x00b\"",
	"name==\"\ufffd\"", "name!=\"a\ufffdb\"", `name=="\ufffd"`, `name=="\xef\xbf\xbd"`, `name=="\xff"`, `name!="\xff"`,
	`labels."\xff"`, `name."\xff"`, `"\xff"`, `"\xff"!=x`, `labels."\ufffd"`, `labels.a=="\xff"`, `labels.a~="\xff"`, `labels.a~="\ufffd"`, `labels.a~="^\xff$"`,
	`name=="\ud800"`, `name!="\ud800"`, `name=="\udfff"`, `name=="\x78"`, `name=="\170"`, `name=="\u0078"`,
	`name=="\U00000078"`, `name=="\x4"`, `name=="\x"`, `name=="\xg0"`, `name=="\17"`, `name=="\178"`, `name=="\400"`,
	`name=="\377"`, `name=="\777"`, `name=="\8"`, `name=="\u123"`, `name=="\u00E9"`, `name=="\U00110000"`,
	`name=="\U0010FFFF"`, `name=="\UFFFFFFFF"`, `name=="\U80000041"`, `name=="\U7FFFFFFF"`,
	`name=="\a\b\f\n\r\t\v"`, `labels.b=="tab\there"`, `labels.a=="say \"hi\""`, `labels.b=="back\\slash"`,
	`name=="quo\"te\\d"`, `name=="\'"`, `name=="'"`, `name=="\/"`, `name=="\|"`, `name=="\q"`, `name=="\é"`, "name==\"\\\n\"",
	`name=="\ "`, "name==\"\\x7\u0661\"", "name==/x/", "name==|x|", "name!=/x/", "name==/x",

	// Regular expressions, quoted in three ways.
	"name~=x", "name~=^x$", "name~=/x/", "name~=|x|", `name~="x"`, "name~=/x|", "name~=/x", "name~=|x", "name~=//",
	"name~=||", `name~=""`, `name~=/a\/b/`, `labels.c~=/a\/b/`, `labels.c~=|a/b\|c|`, `labels.c~=|a/b\\|c|`, `name~=/\|/`,
	`name~=|\/|`, `name~=/\"/`, `name~=/a"b/`, "name~=/x/y", "name~=/x/,kind", "name~=/x/ ,kind", "name~=/a,b/", "name~=a,b",
	"name~=a|b", "name~=(a|x)", "name~=(", "name~=/(/", "name~=)", "name~=[", "name~=[a-z]+", "name~=[z-a]", "name~=*",
	"name~=+", "name~=?", "name~=x*?", "name~=/./", `name~="^.$"`, `name~=/\d/`, `name~=/\\d/`, `name~=\`, `name~=a\`,
	`labels.a~=/\n/`, `labels.a~="(?s)line.break"`, "labels.a~=line.break", `labels.a~="(?m)^break$"`, `labels.a~="^break$"`,
	"name~=(?i)X", "name~=(?i)É", "labels.b~=(?i)s", "labels.b~=(?i)k", `name~=\pL`, `name~=\p{Han}`, `name~=\p{Lu}`,
	"name~=[[:upper:]]", `name~=\x{65e5}`, "name~=(?P<n>x)", "name~=(?<n>x)", "name~=(?:x)", "name~=x{1}", "name~=x{1,2}",
	"name~=x{1,}", "name~=x{2,1}", `name~=\z`, `name~=\Ax\z`, "name~=(?=x)", "name~=(?!x)", `name~=(x)\1`, `name~=\bte`,
	"name~=$", "name~=^", "name~=^^$", "name~=x$^", "name~=()", "name~=[^x]", "name~=[]x]", "name~=[^]x]", `name~="\\x78"`,
	"name~=e\u0301|é",

	// Regular expressions near the places where Go's dialect ends.
	`name~=\d`, `labels.b~=\D`, `labels.A~=\W`, `labels.b~=[\w]{2}`, `labels.b~=(?i)\w{3}`, `name~=\C`, `name~=\Z`,
	`name~=\_`, `name~=\-`, `name~=\0170`, `name~=\07`, `name~=\h`, `name~=\e`, "labels.c~=a{,2}", "labels.a~=x{2}",
	"name~=x{a}", "name~=x{1001}", "name~=x{0,1000}", "name~=x{}", "name~=[x~~y]", "name~=(?x) x", "name~=(?i-s)X",
	"name~=(?-)x", "name~=(?i-)X", "name~=x{2}{3}", "name~=^*", "name~=|*", "name~=a||x", "name~=(|x)", "name~=(?P<>x)",
	"name~=(?P=x)", `name~=\p{han}`, `name~=\p{Letter}`, `name~=\p{L}`, `name~=\pé`, `name~=\p{Any}`, "name~=[[:word:]]",
	"name~=[:word:]", "name~=[[:^alpha:]]", `name~=\x7`, `name~=\x{110000}`, `name~=\x{}`, `name~=\x{d800}`,
	`name~=[\x{65e0}-\x{65ef}]`, `name~=[a-\d]`, "name~=[a-c-e]", `name~=[\b]`, `name~=(\pL{0,100}){0,9}`,
	"name~=(((x{0,100}){0,100}){0,100})", "name~=(x{0,30}){0,30}", `name~=\w{50}|x`,
	"name~=(?U)x+", `labels.b~=\d+x`, `name~=[a-z0-9_.-]+$`, `name~=^(base|x)$`, `name~=^default/[0-9]+/`,
	"name~=" + strings.Repeat("(", 240) + "x" + strings.Repeat(")", 240),

	// What containerd asks after a remote layer, and its neighbours: the daemon has an index.
	`labels."containerd.io/snapshot.ref"==sha256:abc,parent==""`, `labels."containerd.io/snapshot.ref"==sha256:abc,parent==base`,
	`parent==base,labels."containerd.io/snapshot.ref"=="sha256:abc"`, `labels.containerd."io/snapshot".ref==sha256:abc,parent==base`,
	`labels."containerd.io/snapshot.ref"==sha256:abc`, `labels."containerd.io/snapshot.ref"==sha256:abc,parent==base,kind==active`,
	`labels."containerd.io/snapshot.ref"==sha256:abc,parent==base,parent==x`,
	`labels."containerd.io/snapshot.ref"==sha256:abc,parent!=base`, `labels."containerd.io/snapshot.ref"==sha256:abc,parent.x==base`,
	`labels."containerd.io/snapshot.ref"=="",parent==""`, `labels."containerd.io/snapshot.ref"==sha256:ab,parent==base`,
	`labels."containerd.io/snapshot.ref"==sha256:abc,labels."containerd.io/snapshot.ref"==z,parent==base`,
}

// otherDialect holds filters that are well-formed for both, but whose regular expressions do
// not mean the same: the daemon has Rust's regex crate for Go's package, and both descend
// from RE2. Either side may find more. Among them: \d, \w, \s and \b are ASCII in Go and
// Unicode in Rust; \Q…\E, octal escapes and a lone { exist only in Go; nested sets, &&, --,
// \u, (?x), (?u) and many names of properties only in Rust; what is too large or repeats a
// repetition is refused differently, and a refused expression finds nothing. Plain patterns
// over ASCII, such as keys, digests and names of labels, mean the same.
var otherDialect = []string{
	`labels.b~=^\d`, `labels.b~=\d`, `labels.b~=\w\s`, `labels.A~=\w`, `labels.b~=[\d]`, `labels.b~=[^\D]`, `labels.b~=^\s`,
	`labels.b~=\bſ`, `labels.b~=^\S`, `labels.a~=^e\b`, `name~=é\B`, `name~="\\Qx\\E"`, `name~=\Qx\E`, `labels.b~=\Q[a&&b]`,
	`labels.b~=\Qa.b\E$`, `name~=\<x`, `labels.c~=\<\>`, `name~=\170`, `name~=\u0078`, `name~=\U00000078`, "labels.c~={",
	"labels.a~=x{", "labels.b~=[a&&b]", "name~=[a&&b]", "name~=[a--b]", "name~=[w-y--x]", "name~=[a[x]]", "labels.b~=[[]a",
	"name~=[[a-z]]", "name~=[x&&]", "name~=[^x&&y]", `name~="(?x) x"`, "name~=(?u)x", "name~=(?-u)x", `name~=(?-u:\w)`,
	"name~=(?R)x", "name~=(?)", "name~=(?ii)X", "name~=x**", "name~=x???", "name~=(?P<1>x)", "name~=(?P<a.b>x)",
	"name~=(?P<é>x)", `name~=\b{start}x`, `name~=\p{Alphabetic}`, `name~=\p{script=Han}`, `name~=\p{sc:Han}`,
	`name~=\p{^L}`, `name~=\P{^L}`, "name~=[[:Word:]]", "name~=[--a]", `name~=\pL{200}|x`,
	"name~=x+*", `name~="x{1001}|x"`, `labels.c~="a{,2}"`, `labels.c~="a{x}|^$"`,
	"name~=" + strings.Repeat("(", 400) + "x" + strings.Repeat(")", 400),
}

// generator makes filters from pieces of the grammar, so that many are valid, and spoils some
// of them a little.
type generator struct{ *rand.Rand }

func (g generator) oneOf(choices ...string) string { return choices[g.IntN(len(choices))] }

func (g generator) filter() string {
	selectors := make([]string, 1+g.IntN(5)/3)
	for i := range selectors {
		selectors[i] = g.selector()
	}
	text := strings.Join(selectors, g.oneOf(",", ",", ",", ", "))
	for g.IntN(4) == 0 {
		text = g.spoil(text)
	}
	return text
}

func (g generator) selector() string {
	field := g.oneOf("name", "kind", "parent", "labels", "labels", "other", `"name"`)
	if field == "labels" || g.IntN(10) == 0 {
		field += "." + g.oneOf("a", "a", "b", "c", "A", "foo.bar", `"foo.bar"`, `"日本"`, `"with space"`, `"q\"l"`,
			`"\x61"`, `""`, `"\ufffd"`, `"containerd.io/snapshot.ref"`, "none")
	}
	space := g.oneOf("", "", "", "", " ", "\t", "\u00a0")
	switch g.IntN(7) {
	case 0:
		return field
	case 1, 2:
		return field + space + g.oneOf("==", "!=") + space + g.word()
	case 3, 4:
		return field + space + g.oneOf("==", "!=") + space + g.literal()
	case 5:
		return field + "~=" + g.pattern()
	default:
		quote := g.oneOf(`"`, "/", "|")
		escaped := strings.NewReplacer(`\`, `\\`, quote, `\`+quote).Replace(g.pattern())
		return field + space + "~=" + space + quote + escaped + quote
	}
}

func (g generator) word() string {
	return g.oneOf("1", "2", "x", "base", "A", "active", "view", "committed", "é", "日本/é", "a.b", "a/b|c", "sha256:abc",
		"x{2}", "[a&&b]", "plain", "a{,2}<>", "-", "'x'", "e\u0301")
}

// literal quotes a value that some snapshot has, or any pieces.
func (g generator) literal() string {
	var text strings.Builder
	if g.IntN(3) > 0 {
		p := population[g.IntN(len(population))]
		value := g.oneOf(p.name, p.parent, p.labels["a"], p.labels["b"])
		text.WriteString(strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`, "\ufffd", `\ufffd`).Replace(value))
	} else {
		for range g.IntN(4) {
			text.WriteString(g.oneOf("x", "a", "two words", "é", "日本", `\n`, `\t`, `\\`, `\"`, `\x41`, `\101`, `\u00e9`,
				`\U0000FFFD`, `\xff`, `\xc3`, `\251`, ",", "==", "'", "."))
		}
	}
	return `"` + text.String() + `"`
}

// pattern is a regular expression that means the same in Go's dialect and in Rust's.
func (g generator) pattern() string {
	var text strings.Builder
	for range 1 + g.IntN(3) {
		text.WriteString(g.oneOf("x", "a", "b", "é", "[a-e]", "[^x]", "(a|x)", "(?i)A", "(?:b)", `\.`, `\pL`, "s+", ".*", "e?",
			"x{1,2}", `\x41`, "^", "$"))
	}
	return text.String()
}

// spoil changes one place of text.
func (g generator) spoil(text string) string {
	runes := []rune(text)
	at := g.IntN(len(runes) + 1)
	before, after := string(runes[:at]), string(runes[at:])
	switch g.IntN(6) {
	case 0:
		_, size := utf8.DecodeRuneInString(after)
		return before + after[size:]
	case 1:
		return before
	default:
		return before + g.oneOf(",", ".", `"`, "/", "|", `\`, " ", "\n", "\x00", "=", "!", "~", "x", "0", "é", "'", "\ufffd",
			"\u2028", "(", "[", "*") + after
	}
}
