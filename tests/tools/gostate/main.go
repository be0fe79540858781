// Program gostate writes what a Go snapshotter keeps below its root, with the storage package of
// containerd that it uses, and prints what that package says about each snapshot.
//
//	gostate small|large DIRECTORY     writes DIRECTORY/metadata.db and DIRECTORY/snapshots
//	gostate odd DIRECTORY             the same, with records that nothing should have written
//	gostate serve DIRECTORY SOCKET    is a Go snapshotter: containerd's overlayfs, behind a socket
//	gostate lock DIRECTORY            holds the lock of metadata.db until its standard input ends
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	api "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	bolt "go.etcd.io/bbolt"
	"google.golang.org/grpc"
)

const (
	remote = "containerd.io/snapshot/remote"
	digest = "containerd.io/snapshot/cri.layer-digest"
	image  = "containerd.io/snapshot/cri.image-ref"
	ref    = "containerd.io/snapshot.ref"
)

type state struct {
	dir   string
	store *storage.MetaStore
}

type record struct {
	ID      string            `json:"id"`
	Name    string            `json:"name"`
	Parent  string            `json:"parent"`
	Kind    string            `json:"kind"`
	Created string            `json:"created"`
	Updated string            `json:"updated"`
	Labels  map[string]string `json:"labels"`
	Size    int64             `json:"size"`
	Inodes  int64             `json:"inodes"`
	Parents []string          `json:"parents"`
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "gostate:", err)
		os.Exit(1)
	}
}

func (s *state) write(fn func(context.Context) error) {
	check(s.store.WithTransaction(context.Background(), true, fn))
}

func (s *state) makeDirs(id string, active bool) {
	check(os.MkdirAll(filepath.Join(s.dir, "snapshots", id, "fs"), 0o755))
	check(os.Chmod(filepath.Join(s.dir, "snapshots", id), 0o700))
	if active {
		check(os.Mkdir(filepath.Join(s.dir, "snapshots", id, "work"), 0o711))
	}
}

// create makes an active snapshot or a view with its directories and one file.
func (s *state) create(ctx context.Context, kind snapshots.Kind, key, parent string, labels map[string]string) error {
	made, err := storage.CreateSnapshot(ctx, kind, key, parent, snapshots.WithLabels(labels))
	if err != nil {
		return err
	}
	s.makeDirs(made.ID, kind == snapshots.KindActive)
	return nil
}

// layer makes a committed snapshot as a pull does. A remote one has no files.
func (s *state) layer(ctx context.Context, name, parent string, usage snapshots.Usage, labels map[string]string) error {
	key := "extract " + name
	if err := s.create(ctx, snapshots.KindActive, key, parent, labels); err != nil {
		return err
	}
	id, err := storage.CommitActive(ctx, key, name, usage, snapshots.WithLabels(labels))
	if err != nil {
		return err
	}
	if labels[remote] == "" {
		return os.WriteFile(filepath.Join(s.dir, "snapshots", id, "fs", "layer-"+id), []byte(name[:1]), 0o644)
	}
	return nil
}

func remoteLabels(n int, reference string) map[string]string {
	return map[string]string{
		remote: "remote snapshot",
		digest: "sha256:" + strings.Repeat(fmt.Sprintf("%02x", n), 32),
		image:  reference,
		ref:    fmt.Sprintf("sha256:c%d", n),
	}
}

func (s *state) small(ctx context.Context) error {
	const published, mixed = "example.org/published:1", "example.org/mixed:2"
	parent := ""
	for n := 1; n <= 3; n++ {
		name := fmt.Sprintf("sha256:c%d", n)
		if err := s.layer(ctx, name, parent, snapshots.Usage{}, remoteLabels(n, published)); err != nil {
			return err
		}
		parent = name
	}
	for n, name := range []string{"k8s.io/7/sha256:d1", "k8s.io/9/sha256:d2"} {
		usage := snapshots.Usage{Size: 4096 * int64(n+1), Inodes: int64(n + 2)}
		labels := map[string]string{image: mixed, "containerd.io/snapshot/note": "öß \"q\""}
		if err := s.layer(ctx, name, parent, usage, labels); err != nil {
			return err
		}
		parent = name
	}
	if err := s.layer(ctx, "default/20/sha256:e1", "", snapshots.Usage{Size: 8192, Inodes: 3}, nil); err != nil {
		return err
	}
	for _, one := range []struct {
		kind        snapshots.Kind
		key, parent string
	}{
		{snapshots.KindActive, "k8s.io/11/container-1", "k8s.io/9/sha256:d2"},
		{snapshots.KindActive, "k8s.io/12/container-2", "sha256:c3"},
		{snapshots.KindView, "k8s.io/13/view", "sha256:c2"},
		{snapshots.KindActive, "default/21/alone", ""},
		{snapshots.KindActive, "default/22/on-e1", "default/20/sha256:e1"},
	} {
		if err := s.create(ctx, one.kind, one.key, one.parent, map[string]string{"of": one.key}); err != nil {
			return err
		}
	}
	_, err := storage.UpdateInfo(ctx, snapshots.Info{
		Name: "sha256:c2", Labels: map[string]string{"containerd.io/gc.root": "now"},
	}, "labels.containerd.io/gc.root")
	return err
}

// large fills many pages and frees some: branches, overflow pages, a long freelist.
func (s *state) large() {
	for round := 0; round < 30; round++ {
		s.write(func(ctx context.Context) error {
			parent := ""
			for n := 0; n < 100; n++ {
				name := fmt.Sprintf("k8s.io/%d/sha256:%064x", round*100+n, round*1000+n)
				labels := map[string]string{"round": strconv.Itoa(round)}
				switch n % 20 {
				case 7:
					name += strings.Repeat("k", 32000)
				case 11:
					labels["long"] = strings.Repeat("v", 9000)
				case 13:
					for m := 0; m < 100; m++ {
						labels[fmt.Sprintf("label-%d", m)] = strings.Repeat("w", m)
					}
				case 17:
					labels = remoteLabels(n, "example.org/large:1")
					labels[ref] = name
				}
				if n%10 == 0 {
					parent = ""
				}
				if err := s.layer(ctx, name, parent, snapshots.Usage{Size: int64(n), Inodes: 1}, labels); err != nil {
					return err
				}
				parent = name
			}
			return nil
		})
		if round%3 == 2 {
			s.write(func(ctx context.Context) error {
				for n := 99; n >= 0; n-- {
					name := fmt.Sprintf("k8s.io/%d/sha256:%064x", round*100+n, round*1000+n)
					if n%20 == 7 {
						name += strings.Repeat("k", 32000)
					}
					id, _, err := storage.Remove(ctx, name)
					if err != nil {
						return err
					}
					check(os.RemoveAll(filepath.Join(s.dir, "snapshots", id)))
				}
				return nil
			})
		}
	}
}

// odd damages records of a small state with the plain library.
func odd(dir string) {
	db, err := bolt.Open(filepath.Join(dir, "metadata.db"), 0o600, nil)
	check(err)
	defer db.Close()
	check(db.Update(func(tx *bolt.Tx) error {
		snapshots := tx.Bucket([]byte("v1")).Bucket([]byte("snapshots"))
		put := func(name, key string, value []byte) {
			b, err := snapshots.CreateBucketIfNotExists([]byte(name))
			check(err)
			check(b.Put([]byte(key), value))
		}
		put("no-id", "kind", []byte{2})
		put("no-kind", "id", []byte{100})
		put("strange-kind", "id", []byte{101})
		put("strange-kind", "kind", []byte{9})
		put("orphan", "id", []byte{102})
		put("orphan", "kind", []byte{2})
		put("orphan", "parent", []byte("gone"))
		for _, name := range []string{"twin-1", "twin-2"} {
			put(name, "id", []byte{103})
			put(name, "kind", []byte{3})
		}
		put("child-of-twin", "id", []byte{104})
		put("child-of-twin", "kind", []byte{2})
		put("child-of-twin", "parent", []byte("twin-1"))
		put("on-active", "id", []byte{105})
		put("on-active", "kind", []byte{2})
		put("on-active", "parent", []byte("default/21/alone"))
		put("circle-1", "id", []byte{106})
		put("circle-1", "kind", []byte{3})
		put("circle-1", "parent", []byte("circle-2"))
		put("circle-2", "id", []byte{107})
		put("circle-2", "kind", []byte{3})
		put("circle-2", "parent", []byte("circle-1"))
		put("not-\xff-text", "id", []byte{108})
		put("not-\xff-text", "kind", []byte{2})
		put("bad-digest", "id", []byte{109})
		put("bad-digest", "kind", []byte{3})
		labels, err := snapshots.Bucket([]byte("bad-digest")).CreateBucket([]byte("labels"))
		check(err)
		check(labels.Put([]byte(remote), []byte("remote snapshot")))
		check(labels.Put([]byte(digest), []byte("sha256:../../etc")))
		return snapshots.Put([]byte("no-bucket"), []byte("value"))
	}))
}

func (s *state) print() {
	var records []record
	check(s.store.WithTransaction(context.Background(), false, func(ctx context.Context) error {
		return storage.WalkInfo(ctx, func(ctx context.Context, info snapshots.Info) error {
			id, info, usage, err := storage.GetInfo(ctx, info.Name)
			if err != nil {
				return err
			}
			one := record{
				ID: id, Name: info.Name, Parent: info.Parent, Kind: strings.ToLower(info.Kind.String()),
				Created: strconv.FormatInt(info.Created.UnixNano(), 10),
				Updated: strconv.FormatInt(info.Updated.UnixNano(), 10),
				Labels:  info.Labels, Size: usage.Size, Inodes: usage.Inodes,
			}
			if info.Kind != snapshots.KindCommitted {
				snapshot, err := storage.GetSnapshot(ctx, info.Name)
				if err != nil {
					return err
				}
				one.Parents = snapshot.ParentIDs
			}
			records = append(records, one)
			return nil
		})
	}))
	check(json.NewEncoder(os.Stdout).Encode(records))
}

// serve removes files at a Cleanup only, as the plugin does unless sync_remove is set.
func serve(dir, socket string) {
	snapshotter, err := overlay.NewSnapshotter(dir, overlay.AsynchronousRemove)
	check(err)
	server := grpc.NewServer()
	api.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(snapshotter))
	listener, err := net.Listen("unix", socket)
	check(err)
	check(server.Serve(listener))
}

func main() {
	if len(os.Args) < 3 {
		check(fmt.Errorf("usage: gostate small|large|odd|lock DIRECTORY, or gostate serve DIRECTORY SOCKET"))
	}
	dir := os.Args[2]
	if os.Args[1] == "serve" && len(os.Args) == 4 {
		serve(dir, os.Args[3])
		return
	}
	path := filepath.Join(dir, "metadata.db")
	if os.Args[1] == "lock" {
		db, err := bolt.Open(path, 0o600, nil)
		check(err)
		fmt.Println("locked")
		_, _ = io.Copy(io.Discard, os.Stdin)
		check(db.Close())
		return
	}
	check(os.MkdirAll(filepath.Join(dir, "snapshots"), 0o700))
	// Syncs cost time and nothing here has to survive a crash.
	store, err := storage.NewMetaStore(path, func(o *bolt.Options) error {
		o.NoSync = true
		return nil
	})
	check(err)
	s := &state{dir: dir, store: store}
	switch os.Args[1] {
	case "small", "odd":
		s.write(s.small)
	case "large":
		s.large()
	default:
		check(fmt.Errorf("unknown state %q", os.Args[1]))
	}
	s.print()
	check(store.Close())
	if os.Args[1] == "odd" {
		odd(dir)
	}
}
