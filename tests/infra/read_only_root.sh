# Runs a command as the container of a pod does: its root is read-only, and a folder is its /tmp. Needs its own mounts:
#   unshare --map-root-user --mount sh read_only_root.sh FOLDER CHECKOUT COMMAND...
set -eu
scratch=$1
checkout=$2
shift 2
mount --make-rprivate /
case $checkout in
    /tmp/*)
        mkdir -p "$scratch/${checkout#/tmp/}"
        mount --bind "$checkout" "$scratch/${checkout#/tmp/}"
        mount -o remount,ro,bind "$scratch/${checkout#/tmp/}"
        ;;
esac
mount --rbind "$scratch" /tmp
mount -o remount,ro,bind /
cd "$checkout"
exec "$@"
